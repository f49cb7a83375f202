"""Seeded definitions, realistic in shape: 1.2 KB of JSON a flag, and a fifth as many cohorts.

Most flags are a rollout with a condition or two; some are experiments with variants and payloads, some
target a cohort or a group. The same number and seed give the same definitions on every machine.
"""

from __future__ import annotations

import copy
import json
import random
import uuid
from typing import Any

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
    """Definitions with `flag_count` flags and a fifth as many cohorts."""
    chance = random.Random(f"{seed} {flag_count}")
    cohort_count = flag_count // 5
    return {
        "flags": [_flag(number, cohort_count, chance) for number in range(flag_count)],
        "group_type_mapping": {"0": "organization", "1": "project"},
        "cohorts": {str(1 + number): _cohort(chance) for number in range(cohort_count)},
        "minimal_flag_called_events": False,
        "property_matching_version": 1,
    }


def with_one_flag_changed(data: dict[str, Any], round_: int) -> dict[str, Any]:
    """A copy, as parsed from another answer of the API, with one flag that differs."""
    changed: dict[str, Any] = json.loads(json.dumps(data))
    flag = changed["flags"][round_ * 7919 % len(changed["flags"])]
    flag["version"] += 1 + round_
    flag["name"] = f"{flag['name']} (changed {round_})"
    return changed


def with_flags_changed(data: dict[str, Any], count: int, round_: int) -> dict[str, Any]:
    """A copy with `count` flags that differ; the other flags are the same objects."""
    changed = dict(data)
    flags = changed["flags"] = list(data["flags"])
    for number in range(count):
        place = (round_ * 7919 + number) % len(flags)
        flags[place] = copy.deepcopy(flags[place])
        flags[place]["name"] = f"changed in round {round_}"
    return changed


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
