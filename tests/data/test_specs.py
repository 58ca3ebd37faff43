import pytest

from hamner.data.specs import parse_specs
from hamner.errors import UserError


def test_without_specs_the_builtin_corpus_is_read():
    (spec,) = parse_specs([])
    assert (spec.kind, spec.weight) == ("builtin", 1.0)


@pytest.mark.parametrize(
    ("text", "kind", "location"),
    [
        ("builtin", "builtin", ""),
        ("data/*.jsonl", "files", "data/*.jsonl"),
        ("C:/data", "files", "C:/data"),
        ("hf:owner/name", "hub", "owner/name"),
        ("hf:owner/name:sample-10BT:train", "hub", "owner/name:sample-10BT:train"),
        ("shards:out/dir", "shards", "out/dir"),
    ],
)
def test_kinds(text, kind, location):
    (spec,) = parse_specs([text])
    assert (spec.kind, spec.location) == (kind, location)
    (weighted,) = parse_specs([f"{text}=0.25"])
    assert (weighted.kind, weighted.location) == (spec.kind, spec.location)
    assert (weighted.text, weighted.weight) == (text, 0.25)


def test_weights_are_kept_in_order():
    assert [s.weight for s in parse_specs(["builtin=95", "a.txt=5"])] == [95.0, 5.0]
    assert [s.weight for s in parse_specs(["builtin", "a.txt"])] == [1.0, 1.0]


def test_path_that_exists_may_contain_an_equals_sign(tmp_path):
    folder = tmp_path / "year=2020"
    folder.mkdir()
    (spec,) = parse_specs([str(folder)])
    assert (spec.location, spec.weight) == (str(folder), 1.0)
    (spec,) = parse_specs([f"{folder}=3"])
    assert (spec.location, spec.weight) == (str(folder), 3.0)


def test_name_longer_than_the_file_system_takes_is_no_path():
    (spec,) = parse_specs(["x" * 5000 + "=2"])
    assert (spec.kind, spec.weight) == ("files", 2.0)


@pytest.mark.parametrize("weight", ["0", "-1", "0.0", "abc", "", "nan", "inf"])
def test_bad_weight_is_refused(weight):
    with pytest.raises(UserError, match=f"--data builtin={weight}: the weight .* positive number"):
        parse_specs([f"builtin={weight}"])


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["builtin=1", "a.txt"], "--data a.txt: no weight"),
        (["builtin", "builtin"], "given twice"),
        (["hf:name"], "hf:owner/name"),
        (["hf:a/b:c:d:e"], "hf:owner/name"),
        (["hf:"], "hf:owner/name"),
        ([""], "empty"),
        (["=1", "a.txt"], "--data =1: there is no SPEC before the weight"),
    ],
)
def test_malformed_specs_are_refused(specs, message):
    with pytest.raises(UserError, match=message):
        parse_specs(specs)
