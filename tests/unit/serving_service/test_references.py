"""Which values are secret references, and which variables may be declared."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from servicekit.errors import InvalidParameter
from serving_service.environment import (
    MAX_ENTRY_BYTES,
    ResolvedEnvironment,
    SecretRef,
    check_declared,
    digest_of,
    parse_reference,
    references_of,
)
from tests.support.builders import an_entity

WHOLE = "{{secrets/my_scope/my.key-1}}"


def hostile_templates() -> list[str]:
    """Two hundred values that look like references and are none."""
    pieces = [
        "{{secrets/a/b}}",
        "{secrets/a/b}",
        "{{secrets/a}}",
        "{{secrets//b}}",
        "{{secrets/a/}}",
        "{{secrets/a/b/c}}",
    ]
    pieces += ["{{ secrets/a/b}}", "{{secrets/a/b }}", "{{secrets /a/b}}", "{{secrets/ a/b}}", "{{Secrets/a/b}}"]
    pieces += ["{{SECRETS/a/b}}", "{{secrets/a/b}", "{{{secrets/a/b}}}", "{{secrets\\a\\b}}", "${{secrets/a/b}}"]
    pieces += ["{{secrets/a%2Fb/c}}", "{{secrets/../b}}x", "{{secrets/a/ключ}}", "{{secrets/ä/b}}", "{{secrets/a/b@c}}"]
    pieces += [
        "{{secrets/" + "s" * 129 + "/b}}",
        "{{secrets/a/" + "k" * 129 + "}}",
        "{{secrets/a/b}}\n",
        "\n{{secrets/a/b}}",
    ]
    pieces += [
        "{{secrets/a/b}}\r",
        "{{secrets/a\n/b}}",
        "\ufeff{{secrets/a/b}}",
        "{{secrets/a/b}}\0",
        "{{secrets/a/b\u200b}}",
    ]
    embedded = [
        f"{before}{WHOLE}{after}" for before, after in itertools.product(("", "Bearer ", WHOLE, " ", "\t"), repeat=2)
    ]
    dice = random.Random(2)
    while len(pieces) + len(embedded) < 206:
        broken = list(WHOLE)
        place = dice.randrange(len(broken))
        broken[place] = dice.choice("{} /\n\x00%$é")
        if broken[place] != WHOLE[place] and "/".join("".join(broken).split("/")) != WHOLE:
            pieces.append("".join(broken))
    return [value for value in (*pieces, *embedded) if value not in ("{{secrets/a/b}}", WHOLE)]


def test_two_hundred_hostile_templates_stay_plain_text() -> None:
    templates = hostile_templates()
    assert len(templates) >= 200
    assert [value for value in templates if parse_reference(value) is not None] == []


@pytest.mark.parametrize(
    ("value", "reference"),
    [
        (WHOLE, SecretRef("my_scope", "my.key-1")),
        ("{{secrets/a@b.c-d_e/K}}", SecretRef("a@b.c-d_e", "K")),
        ("{{secrets/" + "s" * 128 + "/" + "k" * 128 + "}}", SecretRef("s" * 128, "k" * 128)),
        ("{{secrets/../..}}", SecretRef("..", "..")),
    ],
)
def test_a_value_that_is_a_whole_reference_is_one(value: str, reference: SecretRef) -> None:
    assert parse_reference(value) == reference
    assert str(reference) == value


def test_references_that_differ_in_letter_case_are_one() -> None:
    entity = an_entity(environment={"A": "{{secrets/Scope/Key}}", "B": "{{secrets/scope/KEY}}", "C": "plain"})
    assert references_of([entity]) == {("scope", "key"): SecretRef("Scope", "Key")}


@pytest.mark.parametrize("name", ["OPENAI_API_KEY", "_", "a1", "PYTHONPATH", "HOMES", "PYTHONHASHSEED"])
def test_ordinary_names_may_be_declared(name: str) -> None:
    check_declared({name: ""}, "environment_vars")


@pytest.mark.parametrize("name", ["", "1A", "A-B", "A B", "A=B", "A\n", "É", "A\0", "a.b"])
def test_names_that_are_no_identifiers_are_refused(name: str) -> None:
    with pytest.raises(InvalidParameter, match=r"^at: .*no name of a variable"):
        check_declared({name: "x"}, "at")


@pytest.mark.parametrize("name", ["PATH", "HOME", "TMPDIR", "PYTHONUNBUFFERED", "LD_PRELOAD", "LD_LIBRARY_PATH"])
def test_names_of_the_platform_are_refused(name: str) -> None:
    with pytest.raises(InvalidParameter, match=f"at: {name} belongs to the platform"):
        check_declared({name: "x"}, "at")


def test_fifty_variables_are_allowed_and_one_more_is_not() -> None:
    variables = {f"V{number}": "x" for number in range(51)}
    check_declared(dict(itertools.islice(variables.items(), 50)), "at")
    with pytest.raises(InvalidParameter, match="51 variables"):
        check_declared(variables, "at")


def test_an_entry_may_have_as_many_bytes_as_the_kernel_takes_and_no_more() -> None:
    check_declared({"AB": "é" * ((MAX_ENTRY_BYTES - 2) // 2)}, "at")
    with pytest.raises(InvalidParameter, match=rf"^at\.AB: .* {MAX_ENTRY_BYTES + 1} bytes"):
        check_declared({"AB": "x" * (MAX_ENTRY_BYTES - 1)}, "at")


def test_a_value_with_nul_is_refused_without_repeating_it() -> None:
    with pytest.raises(InvalidParameter, match=r"^at\.AB: .*NUL") as caught:
        check_declared({"AB": "canary\0"}, "at")
    assert "canary" not in caught.value.message


def test_resolved_values_do_not_show_in_a_representation() -> None:
    assert "canary" not in repr(ResolvedEnvironment({"A": "canary"}, ("canary",)))


def test_whatever_is_run_and_with_which_variables_is_in_the_digest_that_a_grant_binds() -> None:
    """So that nothing of it can be edited in Serving's database and still be launched with secrets (S3)."""
    entity = an_entity()
    model = entity.model
    changed = [
        replace(entity, model=replace(model, name="other")),
        replace(entity, model=replace(model, version="7")),
        replace(entity, model=replace(model, source="s3://elsewhere/model")),
        replace(entity, model=replace(model, created_at=model.created_at + 1)),
        replace(entity, model=replace(model, location=model.source)),
        replace(entity, model=replace(model, location="s3://elsewhere/model")),
        replace(entity, environment={**entity.environment, "PROXY": "http://elsewhere"}),
        replace(entity, environment={"A": "{{secrets/another/key}}"}),
        replace(entity, instance_profile_arn="arn:other"),
    ]
    digests = [digest_of(each) for each in (entity, *changed)]
    assert len(set(digests)) == len(digests)
    assert digest_of(replace(entity, name="renamed", workload_size="Large", scale_to_zero=True)) == digests[0]


def test_what_was_granted_before_places_were_recorded_stays_granted() -> None:
    """Secrets has this digest since; made in any other way, what runs could not be launched any more."""
    assert digest_of(an_entity()).hex() == "d6393fa78395f9ad89a0d84dad21b0290c3ec3e9f2bb8902bfb0d78eb88983b5"
