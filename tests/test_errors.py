from hamner.errors import UserError


def test_sentence_is_one_short_line_that_keeps_its_mend():
    text = str(UserError(f"--data {'x' * 5000}\n: no such file;\u2028 give another"))
    assert text.startswith("--data xxx") and text.endswith("no such file;  give another")
    assert len(text.splitlines()) == 1 and len(text) < 1100
    assert str(UserError("--seed -1: must not be negative")) == "--seed -1: must not be negative"
