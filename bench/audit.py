"""Known vulnerabilities of what is installed, and whether our use reaches them: `make audit`, which installs pip-audit.

Exit code 0: none, or none that our use reaches; 1: some that it does, or that nobody has looked at; 3: database not reachable.
"""

import json
import pathlib
import subprocess
import sys
import sysconfig

# {vulnerability: why our use of the package doesn't reach it}; what is found and not in here fails.
NOT_REACHED = {}


def findings(report):
    """(lines about vulnerabilities, how many of them count, names that the database doesn't know) of pip-audit's JSON.

    None where it knows no package at all: behind a mirror without the database pip-audit skips every one, and calls that none found.
    """
    lines, bad = [], 0
    unknown = [package["name"] for package in report["dependencies"] if "skip_reason" in package]
    if len(unknown) == len(report["dependencies"]):
        return None
    for package in report["dependencies"]:
        for found in package.get("vulns", ()):
            names = {found["id"], *found["aliases"]}
            reason = next((NOT_REACHED[name] for name in sorted(names & NOT_REACHED.keys())), None)
            bad += reason is None
            fixed = ", ".join(found["fix_versions"]) or "no version"
            reached = f"not reached: {reason}" if reason else "perhaps reached: nobody has looked"
            lines.append(f"{package['name']} {package['version']}: {found['id']}, fixed in {fixed}; {reached}")
    return lines, bad, unknown


def audit(program):
    """The exit code."""
    words = [program, "--path", sysconfig.get_path("purelib"), "--format", "json", "--progress-spinner", "off"]
    result = subprocess.run(words, capture_output=True, text=True)
    found = findings(json.loads(result.stdout)) if result.stdout.strip() else None
    if found is None:
        print("database not reachable")
        return 3
    lines, bad, unknown = found
    print(*lines, f"{len(lines)} known vulnerabilities, {bad} that count", sep="\n")
    if unknown:
        print(f"not in the database: {', '.join(unknown)}")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(audit(pathlib.Path(sys.prefix) / "audit" / "bin" / "pip-audit"))
