"""The paper's claims, checked in miniature: python -m claims lists them.

    python -m claims                    # claim, what it takes, verdict; nothing is run
    python -m claims tune               # once, before all others: claims/tuned.json
    python -m claims law 5c             # these: figures/law.png, …, their records in claims.json
    python -m claims all                # every one; hours, and the same command goes on
    python -m claims all --part 1/2     # a half of the runs, "2/2" in another process

A claim is a few runs (claims/runs.py), one primary outcome and a verdict by one rule
(claims/work.py's RULE). Runs are kept in outputs/claims/, those of the law and of the solids in
claims/law/ and claims/solids/, and are not made again, unless the code, the weights or the settings
have changed. figures/claims.json has all numbers, also every paired value; the tables of README.md
and figures/README.md are written from it.
"""
import json
import sys
from pathlib import Path

from claims import edits, exact, law, pictures, solids, student, tuning
from claims.work import RULE, interval, make
from cli.files import read_text, write_text
from cli.run import guarded
from cli.settings import Parser
from prior import HERE, UserError

CLAIMS = law.CLAIMS | pictures.CLAIMS | solids.CLAIMS | edits.CLAIMS | student.CLAIMS | exact.CLAIMS
FOLDER = HERE / "figures"
MARKS = "<!-- the claims: written by python -m claims -->", "<!-- the end of the claims -->"
# verdicts of this project's first rule: several tests a claim, five prompts, other measures
FIRST_RULE = {
    "law": "holds (as the claim γ)", "λ": "undecided", "1a": "undecided", "5a": "undecided",
    "1b": "does not hold here", "4": "holds", "5c": "undecided", "6": "undecided",
    "§7": "undecided", "T1": "undecided", "5b": "undecided", "9": "does not hold here",
    "33": "undecided", "exact": "does not hold here",
    "8, another seed is another picture": "undecided",
    "7 in 3D, VSD drifts there, too": "undecided",
    "LMC-SDS needs less guidance, and is cleaner, than SDS": "does not hold here",
    "LMC-SDS edits better than DDS": "does not hold here",
    "SDS-Bridge lies between SDS and VSD": "does not hold here"}


def read_records(folder):
    """figures/claims.json -> {claim: its record}; {} where there is none.

    UserError where the tables cannot be made of it.
    """
    file = folder / "claims.json"
    if not file.exists():
        return {}
    text = read_text(file)
    try:
        records = json.loads(text)["claims"]
        # whatever the tables and the list will read is there
        long_table({name: records[name] for name in CLAIMS if name in records})
        for record in records.values():
            record["made of"]
        return records
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is not what this command has written: move it away "
                        f"({type(error).__name__}: {error})") from error


def write(folder, names):
    """Write the figures and the records of claims whose jobs are done, then both tables."""
    records = read_records(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        claim = CLAIMS[name]
        results = {key: job.result() for key, job in claim.jobs.items()}
        records[name] = claim.record(results)
        if claim.figure:
            claim.figure(folder / f"{file_name(name)}.png", results)
    records = {name: records[name] for name in CLAIMS if name in records}
    text = json.dumps({"rule": RULE, "claims": records}, indent=1, ensure_ascii=False)
    write_text(folder / "claims.json", text)
    write_text(folder / "README.md", long_table(records))
    page = folder.parent / "README.md"
    if folder == FOLDER and page.exists():
        write_text(page, with_table(page.read_text("utf-8"), records))


# --------------------------------------------------------------------------------------- the tables
def file_name(name):
    """A claim's name as a file's: "5b", "lambda-VSD"."""
    return name.translate(str.maketrans({"λ": "lambda", "§": "section-", " ": "-", ",": None}))


def format_number(value, sign="+"):
    """Format a number, or [mean, low, high]; sign "+" shows that of positive ones, "" does not."""
    if isinstance(value, (list, tuple)):
        mean, low, high = value
        return f"{mean:{sign}.3g} [{low:{sign}.3g}, {high:{sign}.3g}]"
    return f"{value:.3g}"


def outcome(record):
    """The primary outcome in words: its mean, interval, unit, number of pairs and δ."""
    primary = record["primary"]
    found = f"{format_number(interval(primary['values']))} {primary['unit']}".rstrip()
    text = (f"{primary['name']}: {found} "
            f"(n {len(primary['values'])}, δ {primary['delta']:g})")
    return text.replace("|", "\\|")


def verdict_of(record):
    """The verdict, and what it means where two things are equal or the difference may be small."""
    meaning, primary = "", record["primary"]
    _, low, high = interval(primary["values"])
    if record["equality"]:
        meaning = {"holds": ", equal within δ", "the other way round": ", not equal"}.get(
            record["verdict"], "")
    elif 0 < low < primary["delta"] or 0 < -high < primary["delta"]:
        meaning = ", perhaps by less than δ"
    return f"**{record['verdict']}**{meaning}"


def short_table(records):
    """README's: a line for each claim, run or not."""
    lines = ["| | the paper says | primary outcome, 95 % interval | verdict |", "|---|---|---|---|"]
    for name, claim in CLAIMS.items():
        title = f"{claim.title} ({claim.says})".replace("|", "\\|")
        if name in records:
            link = f"[{name}](figures/README.md#{file_name(name).lower()})"
            record = records[name]
            lines.append(f"| {link} | {title} | {outcome(record)} | {verdict_of(record)} |")
        else:
            lines.append(f"| {name} | {title} | – | not run yet |")
    return "\n".join(lines)


def with_table(page, records):
    """README.md with its table between MARKS."""
    if not all(mark in page for mark in MARKS):
        return page
    before, _, rest = page.partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    return f"{before}{MARKS[0]}\n{short_table(records)}\n{MARKS[1]}{after}"


def table(rows, sign=""):
    """Lines of a table of {row: {column: number or [mean, low, high]}}; sign: of format_number."""
    columns = dict.fromkeys(column for row in rows.values() for column in row)
    if not columns:
        return []
    heads = [column.replace("|", "\\|") for column in columns]
    lines = ["", f"| | {' | '.join(heads)} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = [format_number(row[column], sign) if column in row else "–" for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def long_table(records):
    """figures/README.md: the rule, the settings, of each claim its numbers and its figure."""
    lines = ["# The paper's claims, one by one", "", "Written by `python -m claims` from "
             "[claims.json](claims.json), which has every paired value.", "", RULE, "",
             "## The tuned settings", ""]
    for method, tuned in pictures.TUNED.items():
        settings = ", ".join(f"{name} {value:g}" for name, value in tuned["settings"].items())
        found = "not yet tuned to the end"
        if tuned["done"]:
            tried = [f"λ {words.partition(', lam ')[2]}: {value:.2f}"
                     for words, value in tuned["tried"].items() if ", lam " in words]
            found = f"the distance, by λ, is {', '.join(tried)}"
        lines.append(f"- {method}: {settings}; {found}")
    lines += ["", "In tables and figures SDS 7.5 is SDS at λ 7.5. The columns of a figure are "
              "prompts; in a column all runs begin at the same noise. The samples are the prior's "
              "own, at guidance 3, from other noise."]
    for name, record in records.items():
        file = file_name(name)
        lines += ["", f'<a id="{file.lower()}"></a>', "", f"## {name}: {record['claim']}", "",
                  f"{record['paper']}. {outcome(record)}: {verdict_of(record)}. "
                  f"{CLAIMS[name].remark}".rstrip(),
                  *table({"controls (+: moved as it must)": record["controls"]}, "+"),
                  *table(record["numbers"])]
        if CLAIMS[name].figure:
            lines += ["", f"![{name}]({file}.png)"]
    lines += ["", "## The verdicts of the first rule", "", "On five prompts, with several tests a "
              "claim, by measures of which some failed their own controls. Kept so that both "
              "sets of verdicts can be compared.", "", "| | verdict |", "|---|---|"]
    lines += [f"| {name} | {verdict} |" for name, verdict in FIRST_RULE.items()]
    return "\n".join([*lines, ""])


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
        print(f"{name:13} {sum(missing.values()):5.0f} min  {verdict:34} {claim.title} "
              f"({claim.says})")


# ------------------------------------------------------------------------------------ the command
def work(argv):
    """Run what the arguments name, write it, and list all claims."""
    names = {file_name(name): name for name in CLAIMS}
    choices = f"tune, {', '.join(names)} or all"
    parser = Parser(prog="python -m claims", description="Check the paper's claims in miniature.")
    parser.add_argument("claims", nargs="*", metavar="CLAIM", help=f"{choices}; none: a list")
    parser.add_argument("--out", default=FOLDER, type=Path, help="default: figures/")
    parser.add_argument("--part", metavar="I/N", default="1/1", help="one of N processes' runs")
    arguments = parser.parse_args(argv)
    chosen, jobs = [], {}
    for word in arguments.claims:
        if word not in (*names, *CLAIMS, "all", "tune"):
            raise UserError(f"{word} is no claim: choose {choices}")
        if word != "tune":
            chosen += list(CLAIMS) if word == "all" else [names.get(word, word)]
    for name in chosen:
        jobs |= {job.file: job for job in CLAIMS[name].jobs.values()}
    read_records(arguments.out)                       # a damaged file is noticed before the runs
    try:
        if "tune" in arguments.claims:
            tuning.tune(arguments.part)
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
