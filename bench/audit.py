"""Lists known vulnerabilities of the installed packages, and whether this project is affected: `make audit`.

Exit code 0: none that affects this project; 1: some that may affect it; 3: the database could not be reached.
"""

import json
import pathlib
import subprocess
import sys
import sysconfig

# {vulnerability: why this project is not affected}; any other vulnerability gives exit code 1.
NOT_REACHED = {}


def findings(report):
    """Returns (lines about vulnerabilities, how many may affect us, packages unknown to the database) of pip-audit's
    JSON.

    Returns None if all packages are unknown: without access to the database, pip-audit skips every package and
    reports none.
    """
    lines = []
    bad = 0
    unknown = [package["name"] for package in report["dependencies"] if "skip_reason" in package]
    if len(unknown) == len(report["dependencies"]):
        return None
    for package in report["dependencies"]:
        for found in package.get("vulns", ()):
            names = {found["id"], *found["aliases"]}
            reason = next((NOT_REACHED[name] for name in sorted(names & NOT_REACHED.keys())), None)
            bad += reason is None
            fixed = ", ".join(found["fix_versions"]) or "no version"
            reached = f"not affected: {reason}" if reason else "perhaps affected: not examined yet"
            lines.append(f"{package['name']} {package['version']}: {found['id']}, fixed in {fixed}; {reached}")
    return lines, bad, unknown


def audit(program):
    """Runs pip-audit, prints what it found, and returns the exit code."""
    words = [program, "--path", sysconfig.get_path("purelib"), "--format", "json", "--progress-spinner", "off"]
    result = subprocess.run(words, capture_output=True, text=True)
    found = findings(json.loads(result.stdout)) if result.stdout.strip() else None
    if found is None:
        print("database not reachable")
        return 3
    lines, bad, unknown = found
    print(*lines, f"{len(lines)} known vulnerabilities, {bad} of which may affect this project", sep="\n")
    if unknown:
        print(f"not in the database: {', '.join(unknown)}")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(audit(pathlib.Path(sys.prefix) / "audit" / "bin" / "pip-audit"))
