"""Reports on drawn X-rays: what they say of a picture, and of prior exams that nobody has shown.

A report has a line a finding, and a line is plain ("The heart is enlarged.") or speaks of a prior exam ("The
heart remains enlarged."). `without_priors` is a rule-based edit that knows the words alone, not the picture.
"""

import re
from dataclasses import dataclass

import numpy as np

ZONES = ("left apex", "left base", "right apex", "right base")
FINDINGS: dict[str, dict[str, float]] = {  # kind -> value -> how often
    "device": {"none": 0.4, "pacemaker": 0.3, "central line": 0.3},
    "heart": {"normal": 0.5, "enlarged": 0.5},
    "effusion": {"none": 0.4, "left": 0.3, "right": 0.3},
    "nodule": {"none": 0.4} | dict.fromkeys(ZONES, 0.15),
}
PLAIN = {
    "device none": "No device is seen.",
    "device pacemaker": "A pacemaker is in place.",
    "device central line": "A central line is in place.",
    "heart normal": "The heart is normal in size.",
    "heart enlarged": "The heart is enlarged.",
    "effusion none": "No pleural effusion is seen.",
    "effusion": "A {} pleural effusion is seen.",
    "nodule none": "No nodule is seen.",
    "nodule": "There is a nodule in the {}.",
}
SEEN_BEFORE = 0.9  # of the patients had an exam before; no picture tells which
SPOKEN_OF = {"device": 0.5, "heart": 0.9, "effusion": 0.9, "nodule": 0.5}  # then, of what is not normal
NORMAL_TOO = 0.15  # of what is
HEAD, END = "Comparison is made to the prior exam.", "No change since the previous exam."
HEADS, ENDS = 0.2, 0.2  # how often then
USUAL = 0.8  # how often a line takes the more usual way to speak of it
# what the paper counts, in any sentence and whatever the case
KEYWORDS = (
    *"more regress advanc less fewer constant unchanged prior new stable progressed interval".split(),
    *"previous further again since increase improve remain worse persist remov similar cleared".split(),
    *"earlier existing decrease reduc recurren redemonstrat resol still lower larger extubated".split(),
    *"smaller higher continue compar change develop before".split(),
    "has enlarged",
)
EDITS = (
    (re.compile(r"^(Compared to the prior exam|As seen previously), (\w)"), lambda found: found[2].upper()),
    (re.compile(r", unchanged from the previous exam\.$"), lambda found: "."),
    (re.compile(r" remains "), lambda found: " is "),
    (re.compile(r" is again seen"), lambda found: " is seen"),
    (re.compile(r"\b([Nn])o new "), lambda found: f"{found[1]}o "),
)
Spans = list[list[int]]


@dataclass(frozen=True)
class Report:
    """What is true of a picture, and the report that somebody wrote on it."""

    findings: dict[str, str]
    text: str


def draw_report(rng: np.random.Generator) -> Report:
    """Findings by FINDINGS, and a report; it may speak of prior exams where the patient had one."""
    findings = {
        kind: str(rng.choice(list(values), p=list(values.values()))) for kind, values in FINDINGS.items()
    }
    seen_before = rng.random() < SEEN_BEFORE
    lines = []
    for kind, value in findings.items():
        plain = (PLAIN.get(f"{kind} {value}") or PLAIN[kind]).format(value)
        often = NORMAL_TOO if value in ("none", "normal") else SPOKEN_OF[kind]
        spoken_of, way = seen_before and rng.random() < often, int(rng.random() >= USUAL)
        lines.append(with_prior(plain)[way] if spoken_of else plain)
    if seen_before and rng.random() < HEADS:
        lines.insert(0, HEAD)
    if seen_before and rng.random() < ENDS:
        lines.append(END)
    return Report(findings, "\n".join(lines))


def with_prior(plain: str) -> tuple[str, str]:
    """The same said in two ways that speak of a prior exam."""
    small = plain[0].lower() + plain[1:]
    if plain.startswith("No "):
        return plain.replace("No ", "No new ", 1), f"Compared to the prior exam, {small}"
    if plain.startswith("There is "):
        return f"As seen previously, {small}", f"{plain[:-1]}, unchanged from the previous exam."
    remains = plain.replace(" is seen", " is again seen").replace(" is in ", " remains in ")
    if remains == plain:
        remains = plain.replace(" is ", " remains ", 1)
    return remains, f"Compared to the prior exam, {small}"


def speaks_of_prior(line: str) -> bool:
    """Whether one of the paper's words is in it."""
    return any(word in line.lower() for word in KEYWORDS)


def without_priors(text: str) -> tuple[str, Spans, Spans]:
    """The report without what it says of prior exams, and where that was: the lines that were rewritten or
    taken out, as spans of the report, and what stands in their place, as spans of the edited one."""
    lines, was, now = [], [], []
    at = end = 0
    for line in text.split("\n"):
        edited = "" if line in (HEAD, END) else line
        for pattern, instead in EDITS:
            edited = pattern.sub(instead, edited)
        if edited != line:
            was.append([at, at + len(line)])
            if edited:
                now.append([end, end + len(edited)])
        at += len(line) + 1
        if edited:
            lines.append(edited)
            end += len(edited) + 1
    return "\n".join(lines), was, now


def read(text: str) -> dict[str, str | None]:
    """What a report says of each kind of finding; None where it says nothing, or two things."""
    said: dict[str, set[str]] = {kind: set() for kind in FINDINGS}
    for line in text.lower().split("\n"):
        words = set(re.findall(r"\w+", line))
        if words & {"pacemaker", "device"} or "central line" in line:
            found = [value for value in ("pacemaker", "central line") if value in line]
            said["device"].update(found or ["none"])
        elif "heart" in words:
            said["heart"].add("enlarged" if "enlarged" in words else "normal")
        elif "effusion" in words:
            said["effusion"].update({"left", "right"} & words or {"none"})
        elif "nodule" in words:
            said["nodule"].update([zone for zone in ZONES if zone in line] or ["none"])
    return {kind: values.pop() if len(values) == 1 else None for kind, values in said.items()}
