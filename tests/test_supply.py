"""What is installed is what was looked at: requirements.lock and constraints.txt agree, and the
audit of docs/reliability.md names every dependency."""

import re
from pathlib import Path

from tests.test_house import names, pins, setup_arguments

ROOT = Path(__file__).resolve().parents[1]


def locked() -> dict[str, tuple[str, list[str]]]:
    """{name: (version, its hashes)} of requirements.lock."""
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8").replace("\\\n", " ")
    found = {}
    for line in text.splitlines():
        if line.startswith("#") or not line.strip():
            continue
        pin, *hashes = line.split()
        name, version = re.fullmatch(r"([A-Za-z0-9._-]+)==([^*,;]+)", pin).groups()
        assert name.lower().replace("_", "-") not in found
        found[name.lower().replace("_", "-")] = version, hashes
    return found


def test_the_lock_has_the_pins_of_the_constraints_and_a_hash_for_each():
    lock = locked()
    assert {name: version for name, (version, _) in lock.items()} == {
        name: str(pin.specifier).removeprefix("==") for name, pin in pins().items()
    }
    for name, (_, hashes) in lock.items():
        assert hashes, name
        assert all(re.fullmatch("--hash=sha256:[0-9a-f]{64}", one) for one in hashes), name
        assert len(set(hashes)) == len(hashes)


def test_the_lock_names_no_place():
    assert "://" not in (ROOT / "requirements.lock").read_text(encoding="utf-8")


def test_the_audit_names_every_declared_dependency():
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    audited = set(re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE))
    arguments = setup_arguments()
    declared = names(arguments["install_requires"]).union(
        *map(names, arguments["extras_require"].values())
    )
    assert declared <= audited
