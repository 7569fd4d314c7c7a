import torch

from e4t_cli.nn.randomness import choose, draw, epoch_order, generator


def some(seed=0, step=0, **options):
    options = {"batch_size": 16, "train_timesteps": 1000, "shape": (4, 8, 8), **options}
    positions = options.pop("positions", range(options["batch_size"]))
    return draw(seed, step, positions, **options)


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(vars(one).values(), vars(other).values(), strict=True))


def test_a_draw_is_a_function_of_seed_and_step():
    first = some()
    torch.manual_seed(5)
    torch.randn(3)
    assert equal(some(), first)
    assert not torch.equal(some(step=1).epsilon, first.epsilon)
    assert not torch.equal(some(seed=1).epsilon, first.epsilon)
    assert not torch.equal(first.epsilon, first.posterior)
    assert not torch.equal(generator(1, 23).get_state(), generator(12, 3).get_state())


def test_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    some()
    epoch_order(0, 0, 10)
    assert torch.equal(torch.randn(3), expected)


def test_micro_batches_are_slices():
    whole, part = some(), some(positions=range(4, 8))
    for name, value in vars(part).items():
        assert torch.equal(value, getattr(whole, name)[4:8])


def test_every_batch_covers_all_noise_levels_and_every_level_is_as_likely():
    draws = [some(step=step, shape=(1,), batch_size=20) for step in range(400)]
    steps = torch.stack([one.timesteps for one in draws])
    assert torch.equal(steps * 20 // 1000, torch.arange(20).expand(400, -1))
    assert steps.min() == 0
    assert steps.max() == 999
    counts = torch.histc(steps.float(), bins=10, min=0, max=1000)
    assert (counts / counts.mean() - 1).abs().max() < 0.1


def test_the_noise_is_standard_normal():
    noise = some(shape=(4, 32, 32)).epsilon
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02


def test_epochs_are_orders_of_all_samples():
    one, other = epoch_order(0, 0, 50), epoch_order(0, 1, 50)
    assert sorted(one.tolist()) == sorted(other.tolist()) == list(range(50))
    assert not torch.equal(one, other)


def test_choosing_reaches_the_last_and_never_beyond():
    uniform = torch.tensor([0.0, 0.49, 0.5, 1 - 2**-53, 1.0], dtype=torch.float64)
    assert choose(uniform, 2).tolist() == [0, 0, 1, 1, 1]
