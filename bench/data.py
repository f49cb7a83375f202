"""Seeded definitions, realistic in shape: 1.2 KB of JSON a flag, and a fifth as many cohorts.

Most flags are a rollout with a condition or two; some are experiments with variants and payloads, some
target a cohort or a group. The same number and seed give the same definitions on every machine.
"""

from __future__ import annotations

import gc
import json
import os
import random
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_KEPT_IN = "SHMFLAGS_BENCH_DATA"
"""The environment variable with the directory of what was made before."""

_WORDS = """
    account alert annual api archive audit avatar backup badge banner basket batch beta billing board
    budget cache calendar campaign card catalog chart chat checkout client cohort comment compact
    contact coupon credit dark dashboard data default delivery desktop digest discount draft editor
    email event export express feed filter form forum gallery guest guide header history home import
    inbox index insight invite invoice label language layout legacy limit link list locale login map
    market member menu message metric migration mobile model monthly native news note offer onboarding
    order page panel partner payment phone plan player popup premium preview price profile project
    promo queue quota rating receipt refund region reminder report retry review role rollout route
    sandbox schedule search segment session settings shipping sidebar signup sort sources staff status
    stock store stream survey sync table tags team template theme ticket timeline toggle token tour
    trial upload usage vendor video wallet webhook widget wizard workflow workspace
""".split()
_COUNTRIES = """
    AT AU BE BR CA CH CZ DE DK ES FI FR GB IE IN IT JP KR MX NL NO NZ PL PT SE SG US ZA
""".split()
_PLANS = ["free", "starter", "team", "business", "enterprise"]


def make(flag_count: int, *, seed: int = 1) -> dict[str, Any]:
    """Definitions with `flag_count` flags and a fifth as many cohorts, parsed like an answer of the API."""
    kept = Path(os.environ[_KEPT_IN], f"{flag_count}-{seed}.json") if _KEPT_IN in os.environ else None
    with _collector_paused():
        if kept is None or not kept.exists():
            text = json.dumps(_made(flag_count, seed))
            if kept is not None:
                _write(kept, text)
        else:
            text = kept.read_text()
        definitions: dict[str, Any] = json.loads(text)
    return definitions


def change_one_flag(definitions: dict[str, Any], round_: int) -> dict[str, Any]:
    """Have one flag differ, another one in each round; returns what was given."""
    flag = definitions["flags"][round_ * 7919 % len(definitions["flags"])]
    flag["version"] += 1 + round_
    flag["name"] = f"{flag['name']} (changed {round_})"
    return definitions


@contextmanager
def made_once() -> Iterator[None]:
    """Within the block, this process and those that it starts keep what they make in files, and share it."""
    with tempfile.TemporaryDirectory(prefix="shmflags-bench-data-") as directory:
        os.environ[_KEPT_IN] = directory
        try:
            yield
        finally:
            del os.environ[_KEPT_IN]


@contextmanager
def _collector_paused() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _write(path: Path, text: str) -> None:
    """Nobody reads a part of it, also where two processes make the same."""
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(text)
    part.replace(path)


def _made(flag_count: int, seed: int) -> dict[str, Any]:
    chance = random.Random(f"{seed} {flag_count}")
    cohort_count = flag_count // 5
    return {
        "flags": [_flag(number, cohort_count, chance) for number in range(flag_count)],
        "group_type_mapping": {"0": "organization", "1": "project"},
        "cohorts": {str(1 + number): _cohort(chance) for number in range(cohort_count)},
        "minimal_flag_called_events": False,
        "property_matching_version": 1,
    }


def _flag(number: int, cohort_count: int, chance: random.Random) -> dict[str, Any]:
    key = "-".join([*chance.sample(_WORDS, chance.randint(2, 4)), str(number)])
    kind = chance.random()
    variants = chance.choice((0, 0, 0, 2, 3)) if kind > 0.1 else 0
    groups = [_group(cohort_count, chance) for _ in range(chance.choice((1, 1, 2, 2, 3)))]
    return {
        "id": 10_000 + number,
        "team_id": 2,
        "name": _sentence(chance, 3, 12),
        "key": key,
        "filters": {
            "groups": groups,
            "payloads": _payloads(variants, chance),
            "multivariate": {"variants": _variants(variants)} if variants else None,
            "aggregation_group_type_index": 0 if kind > 0.92 else None,
        },
        "deleted": False,
        "active": chance.random() < 0.9,
        "ensure_experience_continuity": False,
        "has_encrypted_payloads": False,
        "version": chance.randint(1, 40),
        "evaluation_runtime": chance.choice(("all", "all", "server")),
        "evaluation_tags": chance.sample(_WORDS, chance.randint(0, 2)),
        "bucketing_identifier": "distinct_id",
    }


def _group(cohort_count: int, chance: random.Random) -> dict[str, Any]:
    return {
        "variant": None,
        "sort_key": str(uuid.UUID(int=chance.getrandbits(128), version=4)),
        "properties": [_property(cohort_count, chance) for _ in range(chance.choice((0, 1, 2, 2, 3)))],
        "rollout_percentage": chance.choice((100, 100, 50, 25, 10, chance.randint(0, 100))),
    }


def _property(cohort_count: int, chance: random.Random) -> dict[str, Any]:
    kind = chance.randrange(6)
    if kind == 0 and cohort_count:
        return {
            "key": "id",
            "type": "cohort",
            "value": chance.randint(1, cohort_count),
            "operator": "in",
            "cohort_name": _sentence(chance, 2, 4),
        }
    if kind == 1:
        emails = [f"{_sentence(chance, 1, 1)}@{chance.choice(_WORDS)}.example" for _ in range(6)]
        return _person("email", "exact", emails)
    if kind == 2:
        return _person("$geoip_country_code", "exact", chance.sample(_COUNTRIES, 5))
    if kind == 3:
        return _person("seats", "gte", chance.randint(1, 500))
    if kind == 4:
        return _person("email", "icontains", f"@{chance.choice(_WORDS)}.example")
    return _person("plan", "exact", chance.sample(_PLANS, 2))


def _person(key: str, operator: str, value: Any) -> dict[str, Any]:
    return {"key": key, "type": "person", "value": value, "operator": operator}


def _variants(count: int) -> list[dict[str, Any]]:
    shares = {2: (50, 50), 3: (34, 33, 33)}[count]
    names = ("control", "test", "test-2")
    return [
        {"key": name, "name": f"The {name} variant", "rollout_percentage": share}
        for name, share in zip(names, shares, strict=False)
    ]


def _payloads(variants: int, chance: random.Random) -> dict[str, str]:
    if chance.random() < 0.5:
        return {}
    names = ("control", "test", "test-2")[:variants] or ("true",)
    return {
        name: json.dumps({"title": _sentence(chance, 2, 4), "color": f"#{chance.getrandbits(24):06x}"})
        for name in names
    }


def _cohort(chance: random.Random) -> dict[str, Any]:
    return {
        "type": "OR",
        "values": [
            {
                "type": "AND",
                "values": [
                    {**_property(0, chance), "negation": chance.random() < 0.2}
                    for _ in range(chance.randint(1, 3))
                ],
            }
            for _ in range(chance.randint(1, 2))
        ],
    }


def _sentence(chance: random.Random, least: int, most: int) -> str:
    return " ".join(chance.choices(_WORDS, k=chance.randint(least, most)))
