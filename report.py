"""Writes a page about a search: how it went, what it found, what it cost.

    python report.py RUN                  of a search that is done, running or interrupted; RUN is its --out folder
    python report.py RUN --random OTHER   against the random search in OTHER, instead of this one's first generation

Reads RUN/acc/ and RUN/checkpoints/search/; writes RUN/report.html, one file that needs no network, and its figures as
RUN/figures/*.svg and *.png. search.py does the same when it ends. For a random search run search.py --strategy
random.
"""

import utils  # first: says in one line that a package is missing

# isort: split
import pathlib

from reports.page import write_report
from settings.command_line import Parser


def make_parser():
    parser = Parser(__doc__, "report")
    folder = {"type": lambda word: pathlib.Path(word).expanduser()}
    parser.add_argument("run", metavar="RUN", **folder, help="the --out folder of a search")
    text = "the --out folder of a random search to compare with"
    parser.add_argument("--random", metavar="DIR", **folder, help=text)
    return parser


def parse_args(argv=None):
    return make_parser().parse_args(argv)


def main(args):
    print(write_report(args.run, args.random))


if __name__ == "__main__":
    utils.run_script(main, parse_args)
