"""check_domain says yes to domains that keep the contract and one sentence to the others."""

import pytest
from PIL import Image

from e4t_cli import Domain, PreparedImage, TuningRecipe
from e4t_cli.images import center_square
from e4t_cli.testing import check_domain


def domain(**changes):
    recipe = TuningRecipe(steps=1, base_learning_rate=1e-6, embedding_penalty=0)
    return Domain(name="dog", descriptor="dog", tuning=recipe, **changes)


def masked(image, target):
    square = center_square(image, target.size)
    return PreparedImage(image=square, mask=Image.new("L", square.size, 200))


def test_good_domains():
    check_domain(domain())
    check_domain(domain(prepare=masked, prompt_templates=("a dog, {}",)))


calls = []


def moody(image, target):
    calls.append(image)
    colour = (len(calls) % 256, 0, 0)
    return PreparedImage(image=Image.new("RGB", (target.size, target.size), colour))


def vandal(image, target):
    image.paste("red", (0, 0, 4, 4))
    return PreparedImage(image=center_square(image, target.size))


def indecisive(image, target):
    square = center_square(image, target.size)
    return PreparedImage(image=square if target.mask else square.rotate(90))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("face", "not Domain"),
        (domain(prepare=lambda image, target: image), "must return a PreparedImage"),
        (domain(prepare=lambda image, target: 1 / 0), "ZeroDivisionError"),
        (domain(prepare=moody), "two results"),
        (domain(prepare=vandal), "changed the picture"),
        (domain(prepare=indecisive), "crops differently"),
        (domain(prompt_templates=("S* and {}",)), "more than once"),
    ],
)
def test_bad_domains(wrong, says):
    with pytest.raises(AssertionError, match=says):
        check_domain(wrong)
