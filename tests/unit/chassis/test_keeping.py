"""How long runs with a label are kept."""

import pytest
from pydantic import ValidationError
from web4lora_chassis.keeping import DAY_SECONDS, Keeping


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ({}, None),
        ({"purpose": "other"}, None),
        ({"purpose": "release"}, "always by its label purpose=release"),
        ({"nightly": "7"}, "14 days by its label nightly"),
        ({"nightly": "7", "purpose": "release"}, "always by its label purpose=release"),
        ({"image": "a:b"}, "0.5 days by its label image=a:b"),
        ({"empty": ""}, "1 days by its label empty="),
        ({"empty": "not"}, None),
    ],
)
def test_the_longest_rule_of_a_runs_labels_counts(labels, said):
    keep = Keeping(keep_labels="nightly:14, purpose=release:always,nightly=7:1,image=a:b:0.5,empty=:1")
    rule = keep.label_rule(labels)
    assert (str(rule) if rule else None) == said


@pytest.mark.parametrize("text", ["", " , "])
def test_without_rules_no_label_counts(text):
    assert Keeping(keep_labels=text).label_rule({"nightly": "1"}) is None


@pytest.mark.parametrize("days", ["14", "always"])
def test_the_time_is_over_once_the_days_are(days):
    rule = Keeping(keep_labels=f"nightly:{days}").label_rule({"nightly": ""})
    assert not rule.over(0.0, 14 * DAY_SECONDS)
    assert rule.over(0.0, 14 * DAY_SECONDS + 1) == (days == "14")


@pytest.mark.parametrize(
    "text", ["nightly", "nightly:", ":14", "nightly:-1", "nightly:nan", "nightly:soon", "a=b=c:1"]
)
def test_what_says_no_time_is_refused(text):
    with pytest.raises(ValidationError, match="write KEY:DAYS"):
        Keeping(keep_labels=text)
