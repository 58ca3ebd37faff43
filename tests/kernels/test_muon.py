import math

import pytest
import torch

from hamner.kernels.adamw import join_master, split_master
from hamner.kernels.muon import (
    RMS,
    STEPS,
    Step,
    muon_apply_,
    muon_apply_reference_,
    muon_momentum_,
    muon_momentum_reference_,
    orthogonalize_,
    symmetric_product,
    symmetric_product_reference,
)
from tests.kernels.accuracy import assert_as_accurate_as_torch
from tests.kernels.gradients import DTYPES

JORDAN = (Step(1.0, ((2.0315, -4.7750, 3.4445),)),) * 5
"""the iteration of torch.optim.Muon"""
POLAR_EXPRESS = (
    (8.089256959190564, -22.297789245260553, 15.747758400660448),
    (3.943378132484332, -2.784615046554493, 0.5038087073896522),
    (3.4729456505183145, -2.5005020560788345, 0.47892752482413115),
    (2.5523222055131347, -1.8868219743979882, 0.4426195090056677),
)
"""(a, b, c) of the best four quintics for singular values from 0.003 to 1 (arXiv:2505.16932,
algorithm 1, with its safety of 1.02 and cushion of 0.02)"""
ON_GPU = torch.cuda.is_available()


def normal(*shape, device, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def one(device):
    return torch.ones((), device=device)


def check_product(x, factors, addend=None):
    out = symmetric_product(x, addend=addend, **factors)
    same_dtype = symmetric_product_reference(x, addend=addend, **factors)
    exact = symmetric_product_reference(
        x.double(), addend=None if addend is None else addend.double(), **factors
    )
    assert_as_accurate_as_torch("out", out, same_dtype, exact)
    below = out.tril(-1)
    assert torch.equal(below.mT, out.triu(1))


@pytest.mark.parametrize("dtype", DTYPES)
class TestSymmetricProduct:
    @pytest.mark.parametrize(
        "shape", [(1, 1, 1), (2, 37, 50), (1, 130, 33), (1, 128, 50), (1, 270, 20)], ids=str
    )
    def test_accuracy(self, shape, dtype, device):
        x = normal(*shape, device=device, dtype=dtype)
        check_product(x, {})
        addend = symmetric_product(x)
        factors = {"product_factor": 0.3, "addend_factor": -1.7, "identity_factor": 2.5}
        check_product(x, factors, addend)

    @pytest.mark.parametrize("size", [5, 33, 70])
    def test_part_of_another_tensor_in_another_dtype(self, size, dtype, device):
        """As Gram matrices of several kinds come beside each other."""
        x = normal(2, size, 50, device=device, dtype=dtype) / size
        factors = torch.tensor([0.5, 3.0], device=device)
        options = {"product_factor": -2.0, "identity_factor": 1.0, "factors": factors}
        together = torch.zeros(4, size, size, device=device)
        out = symmetric_product(x, out=together[1:3], **options)
        assert out.data_ptr() == together[1].data_ptr()
        exact = symmetric_product_reference(x.double(), **options)
        same_dtype = symmetric_product_reference(x, out=torch.empty_like(out), **options)
        assert_as_accurate_as_torch("out", out, same_dtype, exact)
        assert not together[0].any() and not together[3].any()

    @pytest.mark.parametrize("view", ["transposed", "rows of a larger tensor", "every other"])
    def test_any_strides(self, view, dtype, device):
        whole = normal(2, 70, 90, device=device, dtype=dtype)
        views = {
            "transposed": whole.mT,
            "rows of a larger tensor": whole[:, 11:50],
            "every other": whole[:, ::2, ::3],
        }
        check_product(views[view], {})

    @pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 5), (2, 5, 0)], ids=str)
    def test_empty(self, shape, dtype, device):
        x = torch.empty(shape, device=device, dtype=dtype)
        out = symmetric_product(x, identity_factor=2.0)
        torch.testing.assert_close(out, symmetric_product_reference(x, identity_factor=2.0))


SHAPES = [(1,), (37,), (3, 1000), (2, 3, 512)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clip", [0.75, math.nan])
def test_momentum(clip, dtype, device):
    check_momentum(SHAPES, clip, dtype, device)


def check_momentum(shapes, clip, dtype, device):
    states = [[normal(*shape, device=device, seed=seed) for shape in shapes] for seed in range(3)]
    states[0] = [grad.to(dtype) for grad in states[0]]
    states[2] = [update.to(dtype) for update in states[2]]
    coefficient = torch.tensor(clip, device=device)
    results = {}
    for name, implementation, cast in (
        ("kernel", muon_momentum_, torch.clone),
        ("torch", muon_momentum_reference_, torch.clone),
        ("exact", muon_momentum_reference_, torch.Tensor.double),
    ):
        grads, momenta, updates = ([cast(x) for x in column] for column in states)
        implementation(grads, momenta, updates, beta=0.95, clip_coef=coefficient)
        results[name] = [*momenta, *updates]
    for kernel, plain, exact in zip(*results.values(), strict=True):
        assert_as_accurate_as_torch("momentum or update", kernel, plain, exact)
    if math.isnan(clip):
        assert all(map(torch.equal, results["kernel"][:4], states[1]))
        assert not any(update.any() for update in results["kernel"][4:])


@pytest.mark.parametrize("kind", ["fp32", "half", "split"])
@pytest.mark.parametrize("clip", [1.0, math.inf])
def test_apply(kind, clip, device):
    check_apply(SHAPES, kind, clip, device)


def test_a_graph_of_the_weights_before_an_update_is_refused(device):
    weight = normal(3, 4, device=device).requires_grad_()
    squares = weight.square().sum()
    clip_coef = torch.ones((), device=device)
    muon_apply_(
        [weight], [weight], [weight.detach().clone()], lr=0.1, weight_decay=0.0, clip_coef=clip_coef
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()


def check_apply(shapes, kind, clip, device):
    half = DTYPES[-1]
    masters = [normal(*shape, device=device) for shape in shapes]
    updates = [normal(*shape, device=device, seed=1) for shape in shapes]
    updates = [update if kind == "fp32" else update.to(half) for update in updates]
    options = {
        "lr": 3e-3,
        "weight_decay": 0.1,
        "clip_coef": torch.tensor(clip, device=device),
    }

    def updated(implementation):
        if kind == "split":
            params, rests = zip(*(split_master(master) for master in masters), strict=True)
            params, rests = [x.clone() for x in params], [x.clone() for x in rests]
            implementation(params, rests, updates, **options)
            return [join_master(*pair) for pair in zip(params, rests, strict=True)]
        weights = [master.clone() for master in masters]
        params = weights if kind == "fp32" else [weight.to(half) for weight in weights]
        implementation(params, weights, updates, **options)
        if kind == "half":
            assert all(map(torch.equal, params, [weight.to(half) for weight in weights]))
        return weights

    exact = [
        master.double() * (1 - 3e-4) - 3e-3 * update.double()
        for master, update in zip(masters, updates, strict=True)
    ]
    if clip == math.inf:
        exact = [master.double() for master in masters]
    for kernel, plain, expected in zip(
        updated(muon_apply_), updated(muon_apply_reference_), exact, strict=True
    ):
        assert_as_accurate_as_torch("master", kernel, plain, expected)


def test_steps_are_those_of_torch_on_separate_matrices(device, monkeypatch):
    """The oracle iterates in fp32 too, and on each logical matrix by itself."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.clone())
    splits, columns, layers = (24, 8, 8, 40), 24, 2
    packed = [normal(sum(splits), columns, device=device, seed=layer) for layer in range(layers)]
    separate = [part.clone() for weight in packed for part in weight.split(list(splits))]
    for part in separate:
        part.requires_grad_()
    oracle = torch.optim.Muon(
        separate, lr=2e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    momenta = [torch.zeros_like(weight) for weight in packed]
    for step in range(4):
        grads = [
            normal(sum(splits), columns, device=device, seed=100 * step + layer)
            for layer in range(layers)
        ]
        parts = [part for grad in grads for part in grad.split(list(splits))]
        for part, grad in zip(separate, parts, strict=True):
            part.grad = grad
        oracle.step()
        updates = torch.empty(layers, sum(splits), columns, device=device)
        muon_momentum_(grads, momenta, list(updates), beta=0.95, clip_coef=one(device))
        orthogonalize_([updates], [splits], JORDAN, safety=1.0)
        muon_apply_(packed, packed, list(updates), lr=2e-2, weight_decay=0.1, clip_coef=one(device))
    together = torch.cat([part.detach() for part in separate])
    torch.testing.assert_close(torch.cat(packed), together, rtol=1e-4, atol=1e-5)


def singular_values(update, rows, columns):
    return torch.linalg.svdvals(update.double()) / (RMS * math.sqrt(max(rows, columns)))


@pytest.mark.parametrize("shape", [(48, 48), (33, 70), (70, 33), (1, 9), (9, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_singular_values_come_into_a_band(shape, dtype, device):
    updates = normal(3, *shape, device=device, dtype=dtype)
    before = updates.clone()
    orthogonalize_([updates], [[shape[0]]])
    assert updates.dtype == dtype
    for update, gradient in zip(updates, before, strict=True):
        u, given, vh = torch.linalg.svd(gradient.double(), full_matrices=False)
        within_reach = given > 0.003 * given.norm()
        values = singular_values(update, *shape)
        assert values[: within_reach.sum()].min() > 0.6 and values.max() < 1.3, values
        # And the directions are those of the gradient.
        exact = RMS * math.sqrt(max(shape)) * (u @ vh)
        cosine = torch.nn.functional.cosine_similarity(
            update.double().flatten(), exact.flatten(), 0
        )
        assert cosine > 0.97


def test_a_rank_one_gradient_is_followed_along_its_one_direction(device):
    left, right = normal(40, 1, device=device), normal(1, 60, device=device, seed=1)
    updates = (left @ right)[None].contiguous()
    orthogonalize_([updates], [[40]])
    values = singular_values(updates[0], 40, 60)
    assert 0.6 < values[0] < 1.3
    assert values[1] < 1e-2


def test_a_zero_gradient_moves_nothing(device):
    updates = torch.zeros(2, 24, 16, device=device)
    updates[1] = normal(24, 16, device=device)
    orthogonalize_([updates], [[8, 16]])
    assert not updates[0].any()
    assert updates[1].isfinite().all() and updates[1].any()


@pytest.mark.parametrize("magnitude", [1e-8, 1e8])
def test_the_size_of_the_gradient_does_not_matter(magnitude, device):
    gradient = normal(1, 24, 40, device=device)
    scaled = gradient * magnitude
    orthogonalize_([gradient], [[24]])
    orthogonalize_([scaled], [[24]])
    torch.testing.assert_close(scaled, gradient, rtol=1e-4, atol=1e-4)


def test_two_runs_give_the_same_bits(device):
    first = normal(2, 96, 40, device=device, dtype=DTYPES[-1])
    second = first.clone()
    orthogonalize_([first], [[32, 64]])
    orthogonalize_([second], [[32, 64]])
    assert torch.equal(first, second)


def test_the_reference_iterates_to_the_same(device):
    updates = normal(2, 96, 40, device=device)
    plain = updates.double()
    orthogonalize_([updates], [[32, 64]])
    orthogonalize_([plain], [[32, 64]], product=symmetric_product_reference)
    torch.testing.assert_close(updates, plain.float(), rtol=1e-4, atol=1e-4)


def test_kinds_together_are_as_each_by_itself(device):
    """Wide and tall ones, and parts of packed ones, of three shorter sides."""
    shapes, splits = (
        [(2, 48, 16), (3, 16, 40), (2, 24, 40), (0, 8, 8)],
        [(24, 24), (16,), (16, 8), (8,)],
    )
    updates = [normal(*shape, device=device, seed=seed) for seed, shape in enumerate(shapes)]
    single = [update.clone() for update in updates]
    orthogonalize_(updates, splits)
    for update, rows in zip(single, splits, strict=True):
        orthogonalize_([update], [rows])
    assert all(map(torch.equal, updates, single))


def effect(values):
    """The iteration multiplies singular values, at first divided by a norm, into these."""
    for step in STEPS:
        gram = step.scale * values**2
        polynomial = gram
        for square, linear, constant in step.quadratics:
            assert polynomial.square().max() < torch.finfo(torch.float16).max
            addend = gram if step.adds_gram else polynomial
            polynomial = square * polynomial**2 + linear * addend + constant
        values = values * polynomial
    return values


def test_every_singular_value_within_reach_comes_to_one():
    """Nearer than by four quintics of Polar Express; and what is out of reach comes further."""
    values = torch.logspace(math.log10(0.003), 0, 10_000, dtype=torch.float64) / 1.02
    after = effect(values)
    assert after.min() > 0.79 and after.max() < 1.21
    small = torch.logspace(-7, math.log10(0.003), 1000, dtype=torch.float64) / 1.02
    quintics = small
    for a, b, c in POLAR_EXPRESS:
        quintics = a * quintics + b * quintics**3 + c * quintics**5
    assert (effect(small) > quintics).all()


def exact_iteration(update):
    """The function is the iteration in fp64 on (m, n), by its singular values."""
    u, values, vh = torch.linalg.svd(update.double(), full_matrices=False)
    values = effect(values / (1.02 * values.norm()))
    return RMS * math.sqrt(max(update.shape)) * (u * values @ vh)


def iterated_on_x(update):
    """The function is the iteration as it is published, with X multiplied at every step."""
    x = update / (1.02 * update.norm())
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def product_summed_in_fp32(x, *, out=None, **options):
    """The reference as the kernel computes it, where torch rounds a product to the dtype of x."""
    out = torch.empty(*x.shape[:2], x.shape[1], dtype=x.dtype) if out is None else out
    addend = options.pop("addend", None)
    addend = None if addend is None else addend.float()
    return symmetric_product_reference(x.float(), addend=addend, out=out, **options)


@pytest.mark.parametrize("spectrum", ["1 / i", "1 to 1e-4", "one of 50"])
def test_polynomials_are_more_accurate_than_quintics_on_x(spectrum):
    """Rounded to 16 bits both, against the same polynomials in fp64."""
    rows, columns = 128, 350
    left = torch.linalg.qr(normal(rows, rows, device="cpu"))[0]
    right = torch.linalg.qr(normal(columns, rows, device="cpu", seed=1))[0]
    values = {
        "1 / i": 1 / torch.arange(1, rows + 1),
        "1 to 1e-4": torch.logspace(0, -4, rows),
        "one of 50": torch.tensor([50.0] + [1.0] * (rows - 1)),
    }[spectrum]
    update = (left * values @ right.mT).bfloat16()
    rounded = update.clone()[None]
    orthogonalize_([rounded], [[rows]], product=product_summed_in_fp32)
    exact = exact_iteration(update)
    error = (rounded[0] - exact).norm() / exact.norm()
    quintics = iterated_on_x(update.double())
    assert error < 0.03
    assert error < (iterated_on_x(update) - quintics).norm() / quintics.norm()


class TestErrors:
    def test_splits(self, device):
        with pytest.raises(ValueError, match=r"splits \(3, 4\) are not the 8 rows"):
            orthogonalize_([torch.zeros(1, 8, 4, device=device)], [[3, 4]])

    @pytest.mark.parametrize("steps", [(), STEPS[:1]], ids=len)
    def test_steps(self, steps, device):
        with pytest.raises(ValueError, match=f"steps has {len(steps)}; .* at least 2"):
            orthogonalize_([torch.zeros(1, 8, 4, device=device)], [[8]], steps)

    def test_beta(self, device):
        with pytest.raises(ValueError, match="beta is 1.0"):
            muon_momentum_([], [], [], beta=1.0, clip_coef=one(device))

    def test_shapes(self, device):
        x, y = torch.zeros(3, 4, device=device), torch.zeros(4, 3, device=device)
        with pytest.raises(ValueError, match="momentum has shape"):
            muon_momentum_([x], [y], [x], beta=0.9, clip_coef=one(device))
        with pytest.raises(ValueError, match="update has shape"):
            muon_apply_([x], [x], [y], lr=1.0, weight_decay=0.0, clip_coef=one(device))
        with pytest.raises(ValueError, match="x has shape"):
            symmetric_product(x)
        with pytest.raises(ValueError, match="out has shape"):
            symmetric_product(torch.zeros(2, 4, 4, device=device), out=torch.zeros(4, 4))
        with pytest.raises(ValueError, match="factors has shape"):
            symmetric_product(torch.zeros(2, 4, 4, device=device), factors=one(device))

    def test_dtypes(self, device):
        x = torch.zeros(3, 4, device=device)
        with pytest.raises(TypeError, match="momentum is torch.float16"):
            muon_momentum_([x], [x.half()], [x], beta=0.9, clip_coef=one(device))
        with pytest.raises(TypeError, match="param is torch.float32; it must be bfloat16"):
            muon_apply_([x], [x.short()], [x], lr=1.0, weight_decay=0.0, clip_coef=one(device))


@pytest.mark.gpu
class TestOnGpu:
    """The matrices are those of option a."""

    SHAPES = [(1536, 1024), (1024, 1024), (2 * 2816, 1024), (1024, 2816)]

    @pytest.mark.parametrize("view", ["wide", "tall"])
    def test_product_at_training_shape(self, view):
        x = normal(2, 1024, 2816, device="cuda", dtype=torch.bfloat16) * 2816**-0.5
        x = x if view == "wide" else x.mT.contiguous().mT
        check_product(x, {})
        factors = {"product_factor": 0.3, "addend_factor": -1.7, "identity_factor": 2.5}
        check_product(symmetric_product(x), factors, symmetric_product(x))

    def test_iteration_at_training_shape(self):
        updates = [
            normal(2, *shape, device="cuda", dtype=torch.bfloat16, seed=seed)
            for seed, shape in enumerate(self.SHAPES)
        ]
        splits = [(1024, 256, 256), (1024,), (2816, 2816), (1024,)]
        before = [update.clone() for update in updates]
        orthogonalize_(updates, splits)
        for update, given, rows in zip(updates, before, splits, strict=True):
            for part, start in zip(update[1].split(rows), given[1].split(rows), strict=True):
                exact = exact_iteration(start)
                assert (part - exact).norm() < 0.02 * exact.norm()

    def test_momentum_at_training_shape(self):
        check_momentum(self.SHAPES, 0.75, torch.bfloat16, "cuda")

    @pytest.mark.parametrize("kind", ["fp32", "half", "split"])
    def test_apply_at_training_shape(self, kind):
        check_apply(self.SHAPES, kind, 1.0, "cuda")
