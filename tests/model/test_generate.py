"""Tests hold decoding with the cache, the choice of tokens, and text whole at every piece."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from hamner.data.tokenizer import load_tokenizer
from hamner.errors import UserError
from hamner.model.generate import Completion, Generator, choose, generate
from hamner.model.kv_cache import KVCache
from hamner.model.sampling import Sampling
from hamner.model.transformer import Transformer
from tests.models import DENSE, MOE, build, cpu_ops
from tests.saved import sharp
from tests.scripted import Script

GREEDY = Sampling(temperature=0, repetition_penalty=1)
NEUTRAL = Sampling(temperature=1, top_k=0, top_p=1, repetition_penalty=1)
BYTES_ONLY = 261
CONFIGS = {
    "dense": replace(DENSE, vocab_size=BYTES_ONLY),
    "untied": replace(DENSE, vocab_size=BYTES_ONLY, tie_word_embeddings=False, num_kv_heads=4),
    "moe": replace(MOE, vocab_size=BYTES_ONLY),
    "moe-shared": replace(MOE, vocab_size=BYTES_ONLY, num_shared_experts=1, num_experts=3),
    "qk-norm": replace(DENSE, vocab_size=BYTES_ONLY, qk_norm=True),
    "differential": replace(DENSE, vocab_size=BYTES_ONLY, use_differential_attention=True),
}


def recomputed(model, prompt: list[int], count: int) -> list[int]:
    """The whole sequence goes through the model for every token of a greedy continuation."""
    sequence = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            sequence.append(int(model(torch.tensor([sequence])).logits[0, -1].argmax()))
    return sequence[len(prompt) :]


def decoded(generator: Generator, prompt: list[int]) -> list[int]:
    return list(generator.tokens(prompt, GREEDY, seed=0, unpenalized=()))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(vocab_size=BYTES_ONLY)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_greedy_decoding_equals_full_recomputation(config, tokenizer):
    """They are equal token for token, up to the end of the context."""
    model = sharp(config)
    prompt = torch.randint(config.vocab_size, (9,), generator=torch.Generator().manual_seed(3))
    expected = recomputed(model, prompt.tolist(), config.max_seq_len - 9)
    assert len(set(expected)) > 5
    assert decoded(Generator(model, tokenizer), prompt.tolist()) == expected


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits_do_not_depend_on_how_the_prompt_is_cut(config):
    model = sharp(config)
    tokens = torch.randint(config.vocab_size, (1, 40), generator=torch.Generator().manual_seed(4))
    whole = model(tokens).logits
    cache = KVCache(config, 40, device=torch.device("cpu"), dtype=torch.float32)
    with torch.no_grad():
        for part in tokens.split((7, 1, 1, 20, 11), dim=1):
            last = model(part, cache=cache).logits
            assert last.shape == (1, 1, config.vocab_size)
            torch.testing.assert_close(last[:, 0], whole[:, cache.length - 1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("config", [CONFIGS["dense"], CONFIGS["moe"]], ids=["dense", "moe"])
def test_the_kernels_decode_too(config):
    """A pass takes one token, at an offset of RoPE's tables."""
    model = Transformer(config, cpu_ops("triton", "triton"))
    model.initialize(0)
    tokens = torch.randint(config.vocab_size, (1, 8), generator=torch.Generator().manual_seed(4))
    cache = KVCache(config, 8, device=torch.device("cpu"), dtype=torch.float32)
    with torch.no_grad():
        whole = build(config)(tokens).logits
        for part in tokens.split((5, 1, 2), dim=1):
            last = model(part, cache=cache).logits[:, 0]
            torch.testing.assert_close(last, whole[:, cache.length - 1], rtol=0, atol=2e-5)


def test_a_second_prompt_only_costs_its_new_tokens(tokenizer):
    model = sharp(CONFIGS["dense"])
    lengths = []
    model.register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].shape[1]))
    generator = Generator(model, tokenizer, context=24)
    first = list(range(50, 70))
    answer = decoded(generator, first)
    assert lengths == [20, 1, 1, 1]
    lengths.clear()
    # The answer is the past of the next prompt; then one that differs at its tenth token.
    assert decoded(generator, [*first, *answer[:2], 8]) == recomputed(
        model, [*first, *answer[:2], 8], 1
    )
    assert lengths[0] == 1
    lengths.clear()
    changed = [*first[:9], 200, *first[10:]]
    assert decoded(generator, changed) == recomputed(model, changed, 4)
    assert lengths[0] == 11


def test_a_pass_that_is_interrupted_leaves_no_trace_in_the_cache(tokenizer):
    model = sharp(CONFIGS["dense"])
    generator = Generator(model, tokenizer, context=24)
    first = list(range(50, 70))
    expected = decoded(generator, first)

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        decoded(generator, [*first[:9], 200, *first[10:]])
    hook.remove()
    assert decoded(generator, first) == expected


def test_rows_beyond_the_tokenizer_are_never_chosen(tokenizer):
    model = sharp(replace(CONFIGS["untied"], vocab_size=BYTES_ONLY + 39))
    inside = decoded(Generator(model, tokenizer), [7, 8])
    with torch.no_grad():
        model.lm_head.weight[BYTES_ONLY:] = 100 * model.lm_head.weight[inside[0]]
    assert decoded(Generator(model, tokenizer), [7, 8]) == inside
    assert max(inside) < BYTES_ONLY


def test_prompts_that_leave_no_room_are_refused(tokenizer):
    generator = Generator(build(CONFIGS["dense"]), tokenizer, context=8)
    for prompt in ([], list(range(8))):
        with pytest.raises(ValueError, match="context of 8"):
            decoded(generator, prompt)


def frequencies(logits: list[float], sampling: Sampling, penalized=(), draws: int = 4000):
    generator = torch.Generator().manual_seed(0)
    tensor = torch.tensor(logits)
    counts = Counter(choose(tensor, sampling, generator, penalized) for _ in range(draws))
    return [counts[i] / draws for i in range(len(logits))]


LOGITS = torch.tensor([0.4, 0.1, 0.3, 0.2]).log().tolist()


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (NEUTRAL, [0.4, 0.1, 0.3, 0.2]),
        (replace(NEUTRAL, temperature=0), [1, 0, 0, 0]),
        # p ** 2, renormalised by 0.3
        (replace(NEUTRAL, temperature=0.5), [0.16 / 0.3, 0.01 / 0.3, 0.09 / 0.3, 0.04 / 0.3]),
        (replace(NEUTRAL, top_k=2), [4 / 7, 0, 3 / 7, 0]),
        (replace(NEUTRAL, top_p=0.65), [4 / 7, 0, 3 / 7, 0]),
        (replace(NEUTRAL, top_p=0.75), [4 / 9, 0, 3 / 9, 2 / 9]),
        (replace(NEUTRAL, top_p=0.01), [1, 0, 0, 0]),
        (replace(NEUTRAL, min_p=0.45), [4 / 9, 0, 3 / 9, 2 / 9]),
        (replace(NEUTRAL, min_p=1.0), [1, 0, 0, 0]),
        # Top-p sees what top-k left: 4/7 alone is not yet 0.6.
        (replace(NEUTRAL, top_k=2, top_p=0.55), [1, 0, 0, 0]),
        (replace(NEUTRAL, top_k=2, top_p=0.6), [4 / 7, 0, 3 / 7, 0]),
    ],
)
def test_what_each_setting_does_to_the_distribution(sampling, expected):
    # Four standard deviations of 4,000 draws are at most 0.032.
    assert frequencies(LOGITS, sampling) == pytest.approx(expected, abs=0.032)


def test_repetition_penalty_makes_seen_tokens_less_likely_whatever_their_sign():
    greedy = replace(NEUTRAL, temperature=0, repetition_penalty=1.5)
    generator = torch.Generator()
    assert choose(torch.tensor([1.2, 1.0]), greedy, generator, {0}) == 1
    assert choose(torch.tensor([-1.0, -1.2]), greedy, generator, {0}) == 1
    assert choose(torch.tensor([1.2, 1.0]), greedy, generator) == 0
    logits = torch.tensor([1.2, 1.0])
    choose(logits, greedy, generator, {0})
    assert logits.tolist() == pytest.approx([1.2, 1.0])


def test_temperature_0_is_greedy_unless_a_penalty_is_asked_for():
    """What other programs call greedy: the default penalty is of what is drawn."""
    logits, generator = torch.tensor([1.05, 1.0]), torch.Generator()
    assert choose(logits, Sampling(temperature=0), generator, {0}) == 0
    assert choose(logits, Sampling(temperature=0, repetition_penalty=1.1), generator, {0}) == 1
    assert choose(logits, Sampling(temperature=1e-9), generator, {0}) == 1
    assert (Sampling().penalty, Sampling(repetition_penalty=1.3).penalty) == (1.1, 1.3)


TINY = [5e-324, 1e-300, 1e-45, 1e-40, 1e-39]
HUGE = [1e39, 1.7e308]


@pytest.mark.parametrize(
    "setting",
    [
        *({"temperature": value} for value in TINY),
        *({"top_p": value} for value in TINY),
        {"min_p": 1.0, "temperature": 5e-324},
        {"top_k": 10**24, "temperature": 1e-40},
    ],
    ids=str,
)
@pytest.mark.parametrize("scale", [1.0, 1e38])
def test_settings_that_fp32_does_not_hold_take_the_likeliest(setting, scale):
    logits = scale * torch.tensor([0.1, 0.7, -2.0, 0.4])
    assert choose(logits, replace(NEUTRAL, **setting), torch.Generator(), {0, 2}) == 1


@pytest.mark.parametrize("temperature", [0, 5e-324])
def test_any_penalty_gives_a_token(temperature):
    generator = torch.Generator().manual_seed(0)

    def chosen(logits: list[float], penalty: float) -> int:
        sampling = replace(NEUTRAL, temperature=temperature, repetition_penalty=penalty)
        return choose(torch.tensor(logits), sampling, generator, {0, 1})

    for penalty in HUGE:
        assert chosen([0.4, 0.7, 0.1], penalty) == 2
        assert chosen([-0.4, -0.7, -2.0], penalty) == 2
    for penalty in TINY:
        assert chosen([0.4, 0.7, 0.9], penalty) == 1
        assert chosen([-0.4, -0.7, -2.0], penalty) in {0, 1}


def test_high_temperatures_make_all_alike():
    found = frequencies(LOGITS, replace(NEUTRAL, temperature=1.7e308), draws=500)
    assert found == pytest.approx([0.25] * 4, abs=0.08)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_model_is_said(value):
    with pytest.raises(UserError, match="not finite: its training diverged"):
        choose(torch.tensor([0.1, value]), NEUTRAL, torch.Generator())


@pytest.mark.parametrize("seed", [10**23, -5, 2**64])
def test_any_integer_is_a_seed(seed, tokenizer):
    generator = Generator(sharp(replace(CONFIGS["dense"], max_seq_len=8)), tokenizer)
    first, second = (
        list(generator.tokens([7], NEUTRAL, seed=seed, unpenalized=())) for _ in range(2)
    )
    assert first == second
    assert len(first) == 7


def test_a_context_of_one_token_gives_one(tokenizer):
    model = sharp(replace(CONFIGS["dense"], max_seq_len=1))
    expected = recomputed(model, [7], 1)
    assert decoded(Generator(model, tokenizer), [7]) == expected
    assert generate(model, tokenizer, "\x07", sampling=GREEDY, max_new_tokens=10**24) == (
        tokenizer.decode(recomputed(model, tokenizer.encode("\x07"), 1))
    )


def test_the_token_that_ends_a_text_is_not_penalised(tokenizer):
    model = sharp(CONFIGS["dense"])
    prompt = [5, 9, 5, 17]
    strong = Sampling(temperature=0, repetition_penalty=1e6)
    free = next(Generator(model, tokenizer).tokens(prompt, GREEDY, seed=0, unpenalized=()))
    tokens = Generator(model, tokenizer).tokens([*prompt, free], strong, seed=0, unpenalized=())
    kept = Generator(model, tokenizer).tokens(
        [*prompt, free], strong, seed=0, unpenalized=range(BYTES_ONLY)
    )
    assert list(kept) == recomputed(model, [*prompt, free], 59)
    seen = [*prompt, free, *tokens]
    assert len(set(seen)) == len(seen) - 1  # 5 was twice in the prompt


def test_the_seed_decides(tokenizer):
    generator = Generator(sharp(CONFIGS["dense"]), tokenizer)
    one, again, other = (
        list(generator.tokens([7, 8], NEUTRAL, seed=seed, unpenalized=())) for seed in (1, 1, 2)
    )
    assert one == again != other


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("temperature", float("inf")),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0),
        ("top_p", 1.1),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("repetition_penalty", float("inf")),
    ],
)
def test_settings_out_of_range_name_their_flag(field, value):
    with pytest.raises(UserError, match=f"--{field.replace('_', '-')} {value}"):
        Sampling(**{field: value})


def say(tokenizer, text: str, **options) -> tuple[list[str], Completion]:
    """`say` gives the pieces in which `text`, one token a byte, is given out."""
    completion = Completion(Script(tokenizer, tokenizer.encode(text)), [1], GREEDY, **options)
    return list(completion), completion


def test_pieces_never_split_a_character(tokenizer):
    text = "héllo — 你好 👩‍👩‍👧 e\u0301 \ufffd!"
    pieces, completion = say(tokenizer, text)
    assert "".join(pieces) == text == completion.text
    assert pieces[:4] == ["h", "é", "l", "l"]
    assert "你" in pieces
    assert completion.num_tokens == len(text.encode())


def test_bytes_that_make_no_character_are_shown_as_such(tokenizer):
    ids = tokenizer.encode("a你")[:-1]
    assert list(Completion(Script(tokenizer, ids), [1], GREEDY)) == ["a", "\ufffd"]


def test_a_stop_token_ends_the_text_and_is_not_part_of_it(tokenizer):
    ids = [*tokenizer.encode("ab"), 4, *tokenizer.encode("cd")]
    completion = Completion(Script(tokenizer, ids), [1], GREEDY, stop_ids={4})
    assert completion.finish_reason is None
    assert completion.run() == "ab"
    assert (completion.finish_reason, completion.num_tokens) == ("stop", 3)


def test_the_limit_ends_the_text(tokenizer):
    pieces, completion = say(tokenizer, "abcdef", max_new_tokens=3)
    assert pieces == ["a", "b", "c"]
    assert completion.finish_reason == "length"


@pytest.mark.parametrize(
    ("text", "stops", "expected", "reason"),
    [
        ("one END two", ["END"], "one ", "stop"),
        ("one EN two", ["END"], "one EN two", "length"),
        ("one EN", ["END"], "one EN", "length"),
        ("aab", ["ab"], "a", "stop"),
        ("x\n\ny", ["y", "\n\n"], "x", "stop"),
        ("né", ["é"], "n", "stop"),
    ],
)
def test_stop_texts(tokenizer, text, stops, expected, reason):
    pieces, completion = say(tokenizer, text, stop_texts=stops)
    assert "".join(pieces) == completion.text == expected
    assert completion.finish_reason == reason


def test_of_two_stop_texts_in_one_token_the_first_ends_the_text():
    whole = load_tokenizer(vocab_size=4096)
    assert len(whole.encode(" the")) == 1
    pieces, completion = say(whole, "a the", stop_texts=["e", "h"])
    assert "".join(pieces) == completion.text == "a t"


def test_samples_end_with_the_context(tokenizer):
    config = CONFIGS["dense"]
    model = sharp(config)
    prompt = "x" * 60
    text = generate(model, tokenizer, prompt, max_new_tokens=64, sampling=GREEDY)
    expected = recomputed(model, tokenizer.encode(prompt), 4)
    assert tokenizer.eot_id not in expected
    assert text == tokenizer.decode(expected)
    for prompt in (f"{'y' * 137}{'z' * 63}", f"{'z' * 137}{'y' * 63}"):
        end = recomputed(model, tokenizer.encode(prompt)[-63:], 1)
        assert generate(model, tokenizer, prompt, sampling=GREEDY) == tokenizer.decode(end)
    assert generate(model, tokenizer, "", max_new_tokens=3, sampling=GREEDY) == tokenizer.decode(
        recomputed(model, [tokenizer.eot_id], 3)
    )
