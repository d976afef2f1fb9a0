"""The paper's claims, checked in miniature: python -m claims lists them.

    python -m claims                    # claim, what it takes, verdict; nothing is run
    python -m claims 1a 5c              # these: figures/1a.png, …, their rows in claims.json
    python -m claims all                # every one; hours, and the same command goes on
    python -m claims all --part 1/2     # a half of the runs, "2/2" in another process

A claim is a few runs (claims/), tests of what they made and a verdict by one rule (claims/work.py's
RULE). Runs are kept in outputs/claims/ and are not made again, unless the code, the weights or the
settings have changed. figures/claims.json has all numbers; the tables of README.md and
figures/README.md are written from it.
"""
import json
import sys
from pathlib import Path

from claims import edits, exact, pictures, solids, student
from claims.work import RULE, make, paper_tests
from cli.files import write_text
from cli.run import guarded
from cli.settings import Parser
from prior import HERE, UserError

CLAIMS = pictures.CLAIMS | solids.CLAIMS | edits.CLAIMS | student.CLAIMS | exact.CLAIMS
FOLDER = HERE / "figures"
MARKS = "<!-- the claims: written by python -m claims -->", "<!-- the end of the claims -->"


def read_records(folder):
    """figures/claims.json -> {claim: its record}; {} where there is none."""
    file = folder / "claims.json"
    return json.loads(file.read_text("utf-8"))["claims"] if file.exists() else {}


def write(folder, names):
    """Write the figures and the records of claims whose jobs are done, then both tables."""
    records = read_records(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        claim, picture = CLAIMS[name], folder / f"{file_name(name)}.png"
        made_of = claim.made_of()
        if records.get(name, {}).get("made of") == made_of and picture.exists():
            continue
        results = {key: job.result() for key, job in claim.jobs.items()}
        claim.figure(picture, results)
        records[name] = claim.record(results) | {"made of": made_of}
    records = {name: records[name] for name in CLAIMS if name in records}
    text = json.dumps({"rule": RULE, "claims": records}, indent=1, ensure_ascii=False)
    write_text(folder / "claims.json", text)
    write_text(folder / "README.md", long_table(records))
    page = folder.parent / "README.md"
    if folder == FOLDER and page.exists():
        write_text(page, with_table(page.read_text("utf-8"), records))


# --------------------------------------------------------------------------------------- the tables
def file_name(name):
    """A claim's name as a file's: "5b", "gamma"."""
    return name.translate(str.maketrans({"λ": "lambda", "γ": "gamma", "§": "section-", " ": "-",
                                         ",": None}))


def format_number(value):
    """Format a number, or [mean, its standard error]."""
    if isinstance(value, (list, tuple)):
        return f"{value[0]:.3f} ± {value[1]:.3f}"
    return f"{value:g}"


def summary(record):
    """The first test of the paper's, and how many are as the paper says."""
    tests = paper_tests(record["tests"])
    signs = [test["sure"] for test in tests.values()]
    name, first = next(iter(tests.items()))
    return (f"{name}: {first['mean']:+.3f} ± {first['error']:.3f}; of {len(tests)} tests "
            f"{signs.count(1)} surely as the paper says, {signs.count(-1)} surely not")


def short_table(records):
    """README's: a line for each claim, run or not."""
    lines = ["| | the paper says | measured here | verdict |", "|---|---|---|---|"]
    for name, claim in CLAIMS.items():
        title = f"{claim.title} ({claim.says})".replace("|", "\\|")
        if name in records:
            link = f"[{name}](figures/README.md#{file_name(name).lower()})"
            verdict = records[name]["verdict"]
            lines.append(f"| {link} | {title} | {summary(records[name])} | **{verdict}** |")
        else:
            lines.append(f"| {name} | {title} | – | not run |")
    return "\n".join(lines)


def with_table(page, records):
    """README.md with its table between MARKS."""
    if not all(mark in page for mark in MARKS):
        return page
    before, _, rest = page.partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    return f"{before}{MARKS[0]}\n{short_table(records)}\n{MARKS[1]}{after}"


def table_of_tests(tests):
    """Lines of a table: each test's mean, error, number of pairs, and whether it is sure."""
    lines = ["| the paper says that this is positive | mean ± standard error | n | sure |",
             "|---|---|---|---|"]
    for name, test in tests.items():
        sure = ("no", "yes", "the other way")[test["sure"]]
        lines.append(f"| {name} | {test['mean']:+.4f} ± {test['error']:.4f} | {test['n']} "
                     f"| {sure} |")
    return lines


def table_of_numbers(numbers):
    """Lines of a table of {row: {column: number}}; none where there are no numbers."""
    columns = dict.fromkeys(column for row in numbers.values() for column in row)
    if not columns:
        return []
    lines = ["", f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in numbers.items():
        cells = [format_number(row[column]) if column in row else "–" for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def long_table(records):
    """figures/README.md: of each claim its tests, its numbers, its figure."""
    lines = ["# The paper's claims, one by one", "", "Written by `python -m claims` from "
             "[claims.json](claims.json). Means ± standard errors.", "", RULE, ""]
    for name, record in records.items():
        file = file_name(name)
        lines += [f'<a id="{file.lower()}"></a>', "", f"## {name}: {record['claim']}", "",
                  f"{record['paper']}. **{record['verdict'].capitalize()}.** "
                  f"Limits: {record['limits']}.", "", *table_of_tests(record["tests"]),
                  *table_of_numbers(record["numbers"]), "", f"![{name}]({file}.png)", ""]
    return "\n".join(lines)


def print_list(folder):
    """Print a line for each claim: the minutes of the runs that are missing, and its verdict."""
    records = read_records(folder)
    for name, claim in CLAIMS.items():
        missing = {job.file: job.minutes for job in claim.jobs.values() if not job.file.exists()}
        verdict = "–"
        if name in records:
            verdict = records[name]["verdict"]
            if records[name]["made of"] != claim.made_of():
                verdict += " (older code)"
        print(f"{name:13} {sum(missing.values()):5.0f} min  {verdict:32} {claim.title} "
              f"({claim.says})")


# ------------------------------------------------------------------------------------ the command
def work(argv):
    """Run what the arguments name, write it, and list all claims."""
    names = {file_name(name): name for name in CLAIMS}
    choices = f"{', '.join(names)} or all"
    parser = Parser(prog="python -m claims", description="Check the paper's claims in miniature.")
    parser.add_argument("claims", nargs="*", metavar="CLAIM", help=f"{choices}; none: a list")
    parser.add_argument("--out", default=FOLDER, type=Path, help="default: figures/")
    parser.add_argument("--part", metavar="I/N", default="1/1", help="one of N processes' runs")
    arguments = parser.parse_args(argv)
    chosen = []
    for word in arguments.claims:
        if word not in (*names, *CLAIMS, "all"):
            raise UserError(f"{word} is no claim: choose {choices}")
        chosen += list(CLAIMS) if word == "all" else [names.get(word, word)]
    jobs = {}
    for name in chosen:
        jobs |= {job.file: job for job in CLAIMS[name].jobs.values()}
    try:
        done = make(list(jobs.values()), arguments.part)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("; the same command goes on") from None
    if not done:
        print("the other parts are not done yet")
    elif chosen:
        write(arguments.out, chosen)
    print_list(arguments.out)


def main(argv=None):
    """Do the work. -> exit status."""
    return guarded("python -m claims", lambda: work(argv))


if __name__ == "__main__":
    sys.exit(main())
