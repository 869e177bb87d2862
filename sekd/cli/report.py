"""``sekd report``."""

import argparse
import os

from sekd.cli.common import WrongInput, reading_input

DEFAULT_EVALUATIONS = "evaluations"
DESCRIPTION = """\
Show runs on one page: their results, curves, and where the student chooses what to learn.

The page is one HTML file that needs no network. A RUN is the output_dir of a run, or of a sweep, which stands for the
runs of its table. Runs whose recipes differ in the seed alone are shown together. A run that still trains, or that
crashed, is shown as far as it came. The scores of `sekd evaluate` are read from --evaluations.

examples:
  sekd report runs/gsm8k --output report.html
  sekd report runs/sekd runs/full_kd --figures figures     # also tables (CSV, Markdown) and figures (SVG, PNG)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the output_dir of a run or a sweep")
    parser.add_argument("--output", default="report.html", metavar="FILE", help="the page (%(default)s)")
    parser.add_argument("--figures", metavar="DIR", help="a folder for the tables and figures as files")
    parser.add_argument("--title", default="", help="the page's title")
    parser.add_argument(
        "--evaluations", metavar="DIR", help="the --output of `sekd evaluate` (evaluations, if it exists)"
    )


def run(options: argparse.Namespace) -> int:
    if not options.output or (os.path.exists(options.output) and not os.path.isfile(options.output)):
        raise WrongInput(f"--output {options.output!r} is not a file; name one, such as report.html")
    if options.evaluations is not None and not os.path.isdir(options.evaluations):
        raise WrongInput(f"--evaluations {options.evaluations!r} does not exist; name the --output of `sekd evaluate`")
    if options.figures is not None and os.path.exists(options.figures) and not os.path.isdir(options.figures):
        raise WrongInput(f"--figures {options.figures!r} is not a folder")
    from sekd.report.figures import write_figures
    from sekd.report.page import write_report

    with reading_input():
        report = write_report(options.runs, options.output, options.title, options.evaluations or DEFAULT_EVALUATIONS)
        print(f"wrote {options.output}")
        if options.figures:
            for path in write_figures(report, options.figures):
                print(f"wrote {path}")
    return 0
