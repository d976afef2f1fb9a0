"""The paper's claims, checked in miniature: python reproduce.py lists them.

    python reproduce.py                    # claim, what it takes, verdict; nothing is run
    python reproduce.py 1a 5c              # these: figures/1a.png, …, their rows in claims.json
    python reproduce.py all                # every one; hours, and the same command goes on
    python reproduce.py all --part 1/2     # a half of the runs, "2/2" in another process

A claim is a few runs (claims/), tests of what they made and a verdict by one rule (claims/work.py's
RULE). Runs are kept in outputs/claims/, named by the weights, the settings and the code that they
depend on, and are not made again. figures/claims.json has all numbers; the tables of README.md and
figures/README.md are written from it.
"""
import json
import sys
from pathlib import Path

from claims import edits, exact, pictures, solids, student
from claims.work import RULE, code_of, make, vouch
from export import write_text
from prior import HERE
from runs import Parser, UserError, guarded
from tiny.corrective import fingerprint

CLAIMS = pictures.CLAIMS | solids.CLAIMS | edits.CLAIMS | student.CLAIMS | exact.CLAIMS
FOLDER = HERE / "figures"
MARKS = "<!-- the claims: written by reproduce.py -->", "<!-- the end of the claims -->"


def made_of(claim):
    """A digest of a claim's runs and of the code of its module's claims."""
    return fingerprint(*(str(job.file) for job in claim.jobs.values()),
                       code_of(claim.tests.__module__, "CLAIMS"))


def found(folder):
    """figures/claims.json -> {claim: its record}; {} where there is none."""
    file = folder / "claims.json"
    return json.loads(file.read_text("utf-8"))["claims"] if file.exists() else {}


def write(folder, names):
    """The figures and the records of claims whose runs are there, then both tables."""
    records = found(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        claim, picture = CLAIMS[name], folder / f"{file_name(name)}.png"
        if records.get(name, {}).get("made of") == made_of(claim) and picture.exists():
            continue
        results = {key: job.result() for key, job in claim.jobs.items()}
        claim.figure(picture, results)
        records[name] = claim.record(results) | {"made of": made_of(claim)}
    ordered = {name: records[name] for name in CLAIMS if name in records}
    write_text(folder / "claims.json", json.dumps({"rule": RULE, "claims": ordered}, indent=1,
                                                  ensure_ascii=False))
    write_text(folder / "README.md", long_table(ordered))
    page = folder.parent / "README.md"
    if folder == FOLDER and page.exists():
        write_text(page, with_table(page.read_text("utf-8"), ordered))


# --------------------------------------------------------------------------------------- the tables
def file_name(name):
    """A claim's name as a file's: "5b", "gamma"."""
    spoken = {"λ": "lambda", "γ": "gamma", "§": "section-", " ": "-", ",": ""}
    return "".join(spoken.get(letter, letter) for letter in name)


def shown(value):
    """A number, or [mean, its standard error]."""
    if isinstance(value, (list, tuple)):
        return f"{value[0]:.3f} ± {value[1]:.3f}"
    return f"{value:g}"


def measured(record):
    """What was measured, in a cell: the first test, and how many are as the paper says."""
    tests = {name: test for name, test in record["tests"].items()
             if not name.startswith(("control: ", "ours: "))}
    sure, against = (sum(test["sure"] == sign for test in tests.values()) for sign in (1, -1))
    name, first = next(iter(tests.items()))
    return (f"{name}: {first['mean']:+.3f} ± {first['error']:.3f}; of {len(tests)} tests {sure} "
            f"surely as the paper says, {against} surely not")


def short_table(records):
    """README's: a line for each claim, run or not."""
    lines = ["| | the paper says | measured here | verdict |", "|---|---|---|---|"]
    for name, claim in CLAIMS.items():
        link, cells = f"[{name}](figures/README.md#{file_name(name).lower()})", "– | not run"
        if name in records:
            cells = f"{measured(records[name])} | **{records[name]['verdict']}**"
        says = f"{claim.title} ({claim.says})".replace("|", "\\|")
        lines.append(f"| {link if name in records else name} | {says} | {cells} |")
    return "\n".join(lines)


def with_table(page, records):
    """README.md with its table between MARKS."""
    before, _, rest = page.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    if not rest or MARKS[1] not in rest:
        return page
    return f"{before}{MARKS[0]}\n{short_table(records)}\n{MARKS[1]}{after}"


def long_table(records):
    """figures/README.md: of each claim its tests, its numbers, its figure."""
    parts = ["# The paper's claims, one by one", "", "Written by `python reproduce.py` from "
             "[claims.json](claims.json). Means ± standard errors.", "", RULE, ""]
    for name, record in records.items():
        file = file_name(name)
        parts += [f'<a id="{file.lower()}"></a>', "", f"## {name}: {record['claim']}", "",
                  f"{record['paper']}. **{record['verdict'].capitalize()}.** "
                  f"Limits: {record['limits']}.", "",
                  "| the paper says that this is positive | mean ± standard error | n | sure |",
                  "|---|---|---|---|"]
        parts += [f"| {test} | {each['mean']:+.4f} ± {each['error']:.4f} | {each['n']} | "
                  f"{('no', 'yes', 'the other way')[each['sure']]} |"
                  for test, each in record["tests"].items()]
        if record["numbers"]:
            columns = list(dict.fromkeys(key for row in record["numbers"].values() for key in row))
            parts += ["", f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
            parts += [f"| {row} | " + " | ".join(shown(each[key]) if key in each else "–"
                                                 for key in columns) + " |"
                      for row, each in record["numbers"].items()]
        parts += ["", f"![{name}]({file}.png)", ""]
    return "\n".join(parts)


def listing(folder):
    """The table of the program: a line for each claim, made or not."""
    records = found(folder)
    for name, claim in CLAIMS.items():
        jobs = {job.file: job for job in claim.jobs.values()}
        minutes = sum(job.minutes for file, job in jobs.items() if not file.exists())
        record = records.get(name)
        stale = record and record["made of"] != made_of(claim)
        verdict = f"{record['verdict']}{', of older code' * bool(stale)}" if record else "–"
        print(f"{name:13} {minutes:5.0f} min  {verdict:20} {claim.title} ({claim.says})")


def main(argv=None):
    parser = Parser(prog="reproduce.py", description="The paper's claims, checked in miniature.")
    choices = f"{', '.join(map(file_name, CLAIMS))} or all"
    parser.add_argument("claims", nargs="*", metavar="CLAIM", help=f"{choices}; none: a list")
    parser.add_argument("--out", default=FOLDER, type=Path, help="default: figures/")
    parser.add_argument("--part", metavar="I/N", default="1/1", help="one of N processes' runs")
    parser.add_argument("--vouch", action="store_true", help="the code does what it did: keep its "
                        "older runs if the shortest of a kind, made again, ends in the same bits")

    def work():
        given = parser.parse_args(argv)
        named = {file_name(name): name for name in CLAIMS} | {name: name for name in CLAIMS}
        wrong = [name for name in given.claims if name not in named and name != "all"]
        if wrong:
            raise UserError(f"{wrong[0]} is no claim: choose {choices}")
        names = list(CLAIMS) if "all" in given.claims else [named[name] for name in given.claims]
        jobs = {job.file: job for name in names for job in CLAIMS[name].jobs.values()}
        if given.vouch:
            print(vouch(jobs.values()), "older runs kept")
        if not make(list(jobs.values()), given.part):
            print("the other parts are not done yet")
        elif names:
            write(given.out, names)
        listing(given.out)
    status = guarded("reproduce.py", work, go_on=lambda: "; the same command goes on")
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
