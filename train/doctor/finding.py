"""What a rule is, what it finds, and the text that explains it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from train.doctor.signals import Signals

Severity = Literal["note", "problem"]
Figure = Literal["loss", "depth", "dead", "classes", "gap"]


@dataclass(frozen=True)
class Finding:
    """What a rule sees in the signals of a run.

    severity    note: the mechanism is seen; problem: it does harm and it lasts
    first_step  the step at which it showed first, 0 before the first update
    evidence    the numbers, with their uncertainty where they have one
    remedy      what to do
    changes     fields of the configuration, and their values, that the remedy's command sets
    """

    severity: Severity
    first_step: int
    evidence: str
    remedy: str
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Text:
    """One language's explanation of a rule; `brief` is the sentence that findings quote."""

    title: str
    brief: str
    what: str
    why: str
    recognised: str
    helps: str
    helps_not: str


@dataclass(frozen=True)
class Rule:
    """A pure function of the recorded signals, and its explanation.

    when     live: judged while the run trains and afterwards; after: at the end of the run, and of
             one that is judged again; request: needs a training of its own, or several runs
    figures  the pictures of the report that show its evidence
    texts    by language, "en" and "id"
    """

    id: str
    when: Literal["live", "after", "request"]
    check: Callable[[Signals], Finding | None]
    texts: Mapping[str, Text]
    sources: tuple[str, ...]
    figures: tuple[Figure, ...] = ()
