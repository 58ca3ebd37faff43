import copy
import math

import pytest
import torch

from hamner.kernels.adamw import (
    adamw_,
    adamw_reference_,
    clip_coefficient,
    global_grad_norm,
    global_grad_norm_reference,
    join_master,
    split_master,
)
from tests.kernels.accuracy import assert_as_accurate_as_torch
from tests.kernels.gradients import DTYPES, compiled
from tests.waiting import no_waiting

OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def one(device):
    return torch.ones((), device=device)


def make_state(shape, dtype, device, *, fresh=False):
    """The function makes the five tensors of a parameter, as after some steps or fresh."""
    generator = torch.Generator().manual_seed(0)
    master, grad, exp_avg, exp_avg_sq = torch.randn(4, *shape, generator=generator).to(device)
    state = {
        "param": master.to(dtype),
        "master": master,
        "grad": 1e-2 * grad.to(dtype),
        "exp_avg": 1e-2 * exp_avg,
        "exp_avg_sq": 1e-4 * exp_avg_sq.square(),
    }
    if fresh:
        state["exp_avg"].zero_()
        state["exp_avg_sq"].zero_()
    if dtype == torch.float32:
        state["param"] = state["master"]
    return state


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (37,), (3, 1000), (2, 3, 512)])
@pytest.mark.parametrize("step", [1, 2, 1000])
def test_accuracy(step, shape, dtype, device):
    state = make_state(shape, dtype, device, fresh=step == 1)
    clip_coef = torch.tensor(0.75, device=device)
    same_dtype, exact = copy.deepcopy(state), {k: x.double() for k, x in state.items()}
    adamw_(**state, **OPTIONS, step=step, clip_coef=clip_coef)
    adamw_reference_(**same_dtype, **OPTIONS, step=step, clip_coef=clip_coef)
    adamw_reference_(**exact, **OPTIONS, step=step, clip_coef=clip_coef)
    for name in ("param", "master", "exp_avg", "exp_avg_sq"):
        assert_as_accurate_as_torch(name, state[name], same_dtype[name], exact[name])


def make_split_state(shape, device, **kwargs):
    """The master is split; the gradient is bf16 where that can be run."""
    on_gpu = torch.device(device).type == "cuda"
    state = make_state(shape, torch.bfloat16 if on_gpu else torch.float16, device, **kwargs)
    state["param"], state["master"] = split_master(state["master"])
    return state


def whole(state):
    """The function gives the state with its master in one piece."""
    return {**state, "master": join_master(state["param"], state["master"])}


@pytest.mark.parametrize("shape", [(1,), (37,), (3, 1000), (2, 3, 512)])
@pytest.mark.parametrize("step", [1, 2, 1000])
def test_accuracy_of_a_split_master(step, shape, device):
    state = make_split_state(shape, device, fresh=step == 1)
    clip_coef = torch.tensor(0.75, device=device)
    same_dtype, exact = (
        copy.deepcopy(state),
        {k: x.double() for k, x in whole(state).items()},
    )
    adamw_(**state, **OPTIONS, step=step, clip_coef=clip_coef)
    adamw_reference_(**same_dtype, **OPTIONS, step=step, clip_coef=clip_coef)
    adamw_reference_(**exact, **OPTIONS, step=step, clip_coef=clip_coef)
    for name in ("param", "master", "exp_avg", "exp_avg_sq"):
        assert_as_accurate_as_torch(name, whole(state)[name], whole(same_dtype)[name], exact[name])


@pytest.mark.parametrize("implementation", [adamw_, adamw_reference_])
def test_a_split_master_is_updated_as_a_whole_one(implementation, device):
    """They agree bit for bit, over steps that are smaller than bf16 can tell and larger."""
    split = make_split_state((2, 1000), device, fresh=True)
    plain = {k: x.clone() for k, x in whole(split).items()}
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 201):
        gradient = torch.randn(2, 1000, generator=generator).to(split["grad"])
        scalars = {
            **OPTIONS,
            "lr": 1e-2 / step**2,
            "step": step,
            "clip_coef": one(device) * (math.nan if step % 50 == 0 else 0.5),
        }
        for state in (split, plain):
            state["grad"] = gradient
            implementation(**state, **scalars)
    assert_same_bits(join_master(split["param"], split["master"]), plain["master"])
    assert_same_bits(split["param"], split_master(plain["master"])[0])
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(split[name], plain[name]), name


def assert_same_bits(actual, expected):
    """They are equal, signs of zeros and NaNs too."""
    assert actual.dtype == expected.dtype
    bits = torch.int32 if actual.dtype == torch.float32 else torch.int16
    assert torch.equal(actual.view(bits), expected.view(bits))


def every_kind_of_fp32():
    """Every sign and exponent (zero, denormals, infinity) comes with mantissas at the ends, at and
    beside the ties of rounding, and at random; no NaN does."""
    generator = torch.Generator().manual_seed(0)
    upper = torch.arange(2**16, dtype=torch.int64)[:, None] << 16
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF]).expand(2**16, -1)
    lower = torch.cat((lower, torch.randint(2**16, (2**16, 4), generator=generator)), dim=1)
    x = (upper | lower).to(torch.int32).view(torch.float32)
    return x[~x.isnan()]


def test_split_and_join_lose_nothing(device):
    master = every_kind_of_fp32().to(device)
    param, remainder = split_master(master)
    assert (param.dtype, remainder.dtype) == (torch.bfloat16, torch.int16)
    assert_same_bits(join_master(param, remainder), master)
    # Half to even is torch's; where it differs lies a tie, and ours is away from zero.
    rounded = master.to(torch.bfloat16)
    ties = (master.view(torch.int32) & 0xFFFF) == 0x8000
    assert_same_bits(param[~ties], rounded[~ties])
    assert (param[ties].abs() > master[ties].abs()).all()


def test_split_of_what_bf16_has_no_number_for(device):
    largest = torch.finfo(torch.float32).max
    master = torch.tensor([largest, -largest, math.inf, -math.inf], device=device)
    param, remainder = split_master(master)
    assert param.tolist() == [math.inf, -math.inf, math.inf, -math.inf]
    assert join_master(param, remainder).tolist() == master.tolist()
    # Of these, rounding alone would carry the first two into zero.
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001, -0x7FFFFF], dtype=torch.int32)
    param, remainder = split_master(bits.to(device).view(torch.float32))
    assert param.isnan().all()
    assert join_master(param, remainder).isnan().all()


@pytest.mark.parametrize("implementation", [adamw_, adamw_reference_])
def test_an_update_of_zero_keeps_every_kind_of_weight(implementation, device):
    master = every_kind_of_fp32()[:: 37 if device.type == "cpu" else 1].to(device)
    param, remainder = split_master(master)
    zeros = [torch.zeros_like(master) for _ in range(3)]
    options = {**OPTIONS, "weight_decay": 0.0}
    implementation(param, remainder, *zeros, **options, step=1, clip_coef=one(device))
    is_inf = master.isinf()
    # Infinity less 0 times infinity: NaN.
    assert param[is_inf].isnan().all()
    # Equal as numbers: of -0.0 the decay's -0.0 is taken away, which makes it 0.0.
    assert torch.equal(join_master(param, remainder)[~is_inf], master[~is_inf])


def test_a_nan_stays_one(device):
    param, remainder = split_master(torch.ones(5, device=device))
    zeros = [torch.zeros(5, device=device) for _ in range(3)]
    adamw_(param, remainder, *zeros, **{**OPTIONS, "lr": math.nan}, step=1, clip_coef=one(device))
    assert param.isnan().all()
    assert join_master(param, remainder).isnan().all()
    # A GPU's own NaN, of all ones: rounded, it would be the -0.0 that it is split into here.
    param, remainder = param.fill_(-0.0), remainder.fill_(-1)
    assert join_master(param, remainder).isnan().all()
    adamw_(param, remainder, *zeros, **OPTIONS, step=1, clip_coef=one(device))
    assert param.isnan().all()


def test_split_and_join_name_wrong_dtypes():
    with pytest.raises(TypeError, match=r"master is torch\.float64"):
        split_master(torch.zeros(3).double())
    with pytest.raises(TypeError, match=r"param is torch\.float16"):
        join_master(torch.zeros(3).half(), torch.zeros(3, dtype=torch.int16))
    with pytest.raises(TypeError, match=r"remainder is torch\.int32"):
        join_master(torch.zeros(3).bfloat16(), torch.zeros(3, dtype=torch.int32))


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize(
    ("betas", "weight_decay"), [((0.9, 0.95), 0.1), ((0.9, 0.999), 0.0), ((0.0, 0.999), 0.01)]
)
def test_follows_torch_adamw(betas, weight_decay, on_device, device):
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(50, 7, generator=generator).to(device))
    optimizer = torch.optim.AdamW(
        [weight], lr=0.0, betas=betas, eps=1e-8, weight_decay=weight_decay, foreach=False
    )
    master = weight.detach().clone()
    exp_avg, exp_avg_sq = torch.zeros_like(master), torch.zeros_like(master)
    for step in range(1, 9):
        lr = 1e-2 / step
        weight.grad = torch.randn(50, 7, generator=generator).to(device)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        adamw_(
            master, master, weight.grad, exp_avg, exp_avg_sq,
            lr=torch.tensor(lr, device=device) if on_device else lr,
            step=torch.tensor(step, device=device) if on_device else step,
            betas=betas, eps=1e-8, weight_decay=weight_decay, clip_coef=one(device),
        )  # fmt: skip
        torch.testing.assert_close(master, weight.detach(), rtol=2e-6, atol=2e-7)
    moments = optimizer.state[weight]
    torch.testing.assert_close(exp_avg, moments["exp_avg"], rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(exp_avg_sq, moments["exp_avg_sq"], rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("implementation", [adamw_, adamw_reference_])
@pytest.mark.parametrize("clip_coef", [math.nan, math.inf, -math.inf])
def test_a_clip_coefficient_that_is_not_finite_changes_nothing(
    clip_coef, implementation, split, device
):
    shape = (37,)
    state = make_split_state(shape, device) if split else make_state(shape, torch.float16, device)
    state["grad"].fill_(math.nan)
    before = copy.deepcopy(state)
    clip_coef = torch.tensor(clip_coef, device=device)
    implementation(**state, **OPTIONS, step=3, clip_coef=clip_coef)
    for name in ("param", "master", "exp_avg", "exp_avg_sq"):
        assert torch.equal(state[name], before[name]), name


def test_param_is_master_rounded(device):
    state = make_state((37,), torch.float16, device)
    adamw_(**state, **OPTIONS, step=3, clip_coef=one(device))
    assert torch.equal(state["param"], state["master"].half())


def test_clipping_is_a_scaled_gradient(device):
    state = make_state((37,), torch.float32, device)
    scaled = copy.deepcopy(state)
    scaled["grad"] *= 0.5
    adamw_(**state, **OPTIONS, step=3, clip_coef=torch.tensor(0.5, device=device))
    adamw_(**scaled, **OPTIONS, step=3, clip_coef=one(device))
    assert torch.equal(state["master"], scaled["master"])


def test_a_parameter_that_requires_grad(device):
    state = make_state((37,), torch.float16, device)
    state["param"] = torch.nn.Parameter(state["param"])
    squares = state["param"].square().sum()
    adamw_(**state, **OPTIONS, step=1, clip_coef=one(device))
    assert torch.equal(state["param"].detach(), state["master"].half())
    # Autograd knows that it is not what forward read: it would give another's gradient.
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()


def test_empty(device):
    for state in (make_state((0,), torch.float16, device), make_split_state((0,), device)):
        adamw_(**state, **OPTIONS, step=1, clip_coef=one(device))


@pytest.mark.parametrize("implementation", [adamw_, adamw_reference_])
@pytest.mark.parametrize("kind", ["whole master", "split master", "fp32"])
def test_parameters_together_are_updated_as_one_by_one(kind, implementation, device):
    """They agree bit for bit; sizes are near a program's chunk, odd, or 0, and views unaligned."""

    def make(index, numel):
        if kind == "split master":
            state = make_split_state((numel,), device)
        else:
            state = make_state((numel,), torch.float32 if kind == "fp32" else torch.float16, device)
        state["grad"] = state["grad"] * (index + 1)
        return state

    for sizes in ((16, 4096, 8192), (4097, 0, 1, 37, 4096), (0, 0)):
        states = [make(index, numel) for index, numel in enumerate(sizes)]
        apart = copy.deepcopy(states)
        scalars = {**OPTIONS, "step": 3, "clip_coef": torch.tensor(0.75, device=device)}
        columns = {name: [state[name] for state in states] for name in states[0]}
        implementation(**columns, **scalars)
        for together, one_by_one in zip(states, apart, strict=True):
            implementation(**one_by_one, **scalars)
            for name, x in one_by_one.items():
                assert torch.equal(together[name], x), (sizes, name)


def test_parameters_at_unaligned_addresses(device):
    """Shards of a larger tensor are at such addresses."""
    state, exact = (make_split_state((4096,), device) for _ in range(2))
    shifted = {}
    for name, x in state.items():
        shifted[name] = torch.cat((x[:1], x))[1:]
        assert shifted[name].data_ptr() % 16
    scalars = {**OPTIONS, "step": 3, "clip_coef": one(device)}
    adamw_(**shifted, **scalars)
    adamw_(**exact, **scalars)
    for name, x in exact.items():
        assert torch.equal(shifted[name], x), name


def test_no_parameters(device):
    adamw_([], [], [], [], [], **OPTIONS, step=1, clip_coef=one(device))


def test_parameters_that_do_not_go_together():
    cpu = torch.device("cpu")
    half, single = make_state((3,), torch.float16, cpu), make_state((3,), torch.float32, cpu)
    scalars = {**OPTIONS, "step": 1, "clip_coef": one(cpu)}
    with pytest.raises(TypeError, match="must have the same dtypes"):
        adamw_(**{name: [half[name], single[name]] for name in half}, **scalars)
    with pytest.raises(ValueError, match=r"got \[2, 1, 1, 1, 1\] tensors"):
        adamw_(**{**half, "param": [half["param"]] * 2}, **scalars)


@pytest.mark.parametrize("split", [False, True])
def test_compiled_gives_the_same_bits(split, device):
    shape = (37,)
    state = make_split_state(shape, device) if split else make_state(shape, torch.float16, device)
    by_compiled = copy.deepcopy(state)
    scalars = {
        **OPTIONS,
        "lr": torch.tensor(1e-3, device=device),
        "step": torch.tensor(3, device=device),
        "clip_coef": one(device),
    }
    adamw_(**state, **scalars)
    compiled(adamw_)(**by_compiled, **scalars)
    for name, x in state.items():
        assert torch.equal(x, by_compiled[name]), name


@pytest.mark.parametrize("split", [False, True])
def test_opcheck(split, device):
    shape = (37,)
    state = make_split_state(shape, device) if split else make_state(shape, torch.float16, device)
    scalars = (one(device), None, 1e-3, None, 3.0, 0.9, 0.95, 1e-8, 0.1)
    lists = [[tensor] for tensor in state.values()]
    torch.library.opcheck(torch.ops.hamner.adamw_, (*lists, *scalars))


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "master is torch.float16", {"master": torch.zeros(37).half()}),
        (
            TypeError,
            "param is torch.float16; beside an int16 master it must be bfloat16",
            {"master": torch.zeros(37, dtype=torch.int16)},
        ),
        (TypeError, "exp_avg_sq is torch.float64", {"exp_avg_sq": torch.zeros(37).double()}),
        (TypeError, "grad is torch.int64", {"grad": torch.zeros(37).long()}),
        (TypeError, "param is torch.float64", {"param": torch.zeros(37).double()}),
        (ValueError, r"grad has shape \(36,\)", {"grad": torch.zeros(36)}),
        (ValueError, "exp_avg has strides", {"exp_avg": torch.zeros(74)[::2]}),
        (ValueError, "grad is on meta", {"grad": torch.zeros(37, device="meta")}),
        (ValueError, r"betas\[1\] is 1.0", {"betas": (0.9, 1.0)}),
        (ValueError, "clip_coef has 2 elements", {"clip_coef": torch.ones(2)}),
        (ValueError, "lr has 1 elements on meta", {"lr": torch.ones((), device="meta")}),
    ],
)
def test_wrong_arguments(error, message, change):
    cpu = torch.device("cpu")
    arguments = {
        **make_state((37,), torch.float16, cpu),
        **OPTIONS,
        "step": 1,
        "clip_coef": one(cpu),
    }
    with pytest.raises(error, match=message):
        adamw_(**{**arguments, **change})


@pytest.mark.parametrize("global_grad_norm", [global_grad_norm, global_grad_norm_reference])
@pytest.mark.parametrize("dtype", DTYPES)
def test_global_grad_norm(global_grad_norm, dtype, device):
    generator = torch.Generator().manual_seed(0)
    grads = [
        torch.randn(shape, generator=generator).to(device, dtype)
        for shape in [(300, 70), (5,), (0,), (2, 3, 4), (8192,)]
    ]
    grads.append(torch.randn(50, generator=generator).to(device))  # fp32 beside another dtype
    exact = torch.cat([grad.double().flatten() for grad in grads]).norm()
    norm = global_grad_norm(grads)
    assert norm.dtype == torch.float32
    assert norm.shape == ()
    torch.testing.assert_close(norm.double(), exact, rtol=1e-6, atol=0)
    assert torch.equal(norm, global_grad_norm(grads))
    grads[1][2] = math.inf
    assert not global_grad_norm(grads).isfinite()


def test_global_grad_norm_of_half_precision_beyond_its_range(device):
    norm = global_grad_norm([torch.full((100,), 60_000.0, device=device).half()])
    torch.testing.assert_close(norm.item(), 600_000.0, rtol=1e-3, atol=0)


def test_global_grad_norm_of_nothing():
    with pytest.raises(ValueError, match="grads is empty"):
        global_grad_norm([])
    with pytest.raises(TypeError, match="a gradient is torch.float64"):
        global_grad_norm([torch.ones(3).double()])


def test_clip_coefficient_is_that_of_torch(device):
    for norm in (0.0, 0.5, 1.0, 7.0):
        grad = torch.full((4,), norm / 2, device=device)
        parameter = torch.nn.Parameter(torch.zeros_like(grad))
        parameter.grad = grad.clone()
        torch.nn.utils.clip_grad_norm_([parameter], 1.0)
        coefficient = clip_coefficient(global_grad_norm([grad]), 1.0)
        torch.testing.assert_close(grad * coefficient, parameter.grad)


def test_clip_coefficient_of_a_bad_norm_is_nan(device):
    for norm in (math.inf, math.nan):
        assert clip_coefficient(torch.tensor(norm, device=device), 1.0).isnan()
    assert clip_coefficient(torch.tensor(123.0, device=device), math.inf) == 1.0


@pytest.mark.gpu
class TestOnGpu:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_training_shape(self, dtype):
        test_accuracy(1000, (2816, 1024), dtype, "cuda")

    def test_training_shape_of_a_split_master(self):
        test_accuracy_of_a_split_master(1000, (2816, 1024), "cuda")

    def test_a_nan_stays_one(self):
        test_a_nan_stays_one("cuda")

    def test_parameters_at_unaligned_addresses(self):
        test_parameters_at_unaligned_addresses("cuda")

    def test_step_without_host_sync(self):
        state = make_split_state((1024, 1024), "cuda")
        lr, step = torch.tensor(1e-3, device="cuda"), torch.tensor(3, device="cuda")

        def update():
            clip_coef = clip_coefficient(global_grad_norm([state["grad"]]), 1.0)
            adamw_(**state, **{**OPTIONS, "lr": lr}, step=step, clip_coef=clip_coef)

        update()
        torch.cuda.synchronize()
        with no_waiting():
            update()

    @pytest.mark.xdist_group("most of the GPU's memory")
    def test_more_elements_than_int32(self):
        numel = 2**31 + 5
        ones = torch.ones(numel, dtype=torch.bfloat16, device="cuda")
        master, exp_avg, exp_avg_sq = (torch.zeros(numel, device="cuda") for _ in range(3))
        clip_coef = one("cuda")
        adamw_(
            ones, master, ones.clone(), exp_avg, exp_avg_sq, **OPTIONS, step=1, clip_coef=clip_coef
        )
        torch.testing.assert_close(master[-5:], torch.full((5,), -1e-3, device="cuda"))
        assert torch.equal(ones[-5:], master[-5:].bfloat16())

    @pytest.mark.xdist_group("most of the GPU's memory")
    def test_more_elements_than_int32_with_a_split_master(self):
        numel = 2**31 + 5
        param = torch.zeros(numel, dtype=torch.bfloat16, device="cuda")
        remainder = torch.zeros(numel, dtype=torch.int16, device="cuda")
        exp_avg, exp_avg_sq = (torch.zeros(numel, device="cuda") for _ in range(2))
        grad = torch.ones_like(param)
        adamw_(
            param, remainder, grad, exp_avg, exp_avg_sq, **OPTIONS, step=1, clip_coef=one("cuda")
        )
        master = join_master(param[-5:], remainder[-5:])
        torch.testing.assert_close(master, torch.full((5,), -1e-3, device="cuda"))
