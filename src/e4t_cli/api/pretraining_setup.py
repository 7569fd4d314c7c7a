"""Prepares a pre-training: the new domain's descriptor, configs and folder, and training data."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from e4t_cli.api.options import DomainTrainingOptions
from e4t_cli.datasets.reader import ImageReader
from e4t_cli.datasets.sources import ImageSource, IterableSource, MapStyleSource, SinglePassSource
from e4t_cli.errors import E4TError, ResourceError, UsageError, WeightsUnavailable, printable
from e4t_cli.files import free_bytes, shown_size
from e4t_cli.hub.paths import user_cache
from e4t_cli.progress import Progress, ProgressCallback
from e4t_cli.registry.config import PretrainingConfig, TuningConfig
from e4t_cli.registry.discovery import USER, installed_domains, user_domain, user_domains_folder
from e4t_cli.registry.domain import Domain, check_name
from e4t_cli.registry.weights import weights_folder

if TYPE_CHECKING:
    from e4t_cli.models.text_to_image import TextToImageModel
    from e4t_cli.pretraining.batches import DistributedContext
    from e4t_cli.pretraining.encoded_images import TrainingData

_STOP_WORDS = """
a an and any data dataset domain e4t for from image images in me mine my new of on our ours photo
photos pic pics picture pictures set some test the their train training with your yours
"""
"""Words of a folder's or domain's name that do not describe the images."""


def choose_descriptor(name: str, model: TextToImageModel) -> str:
    """Return the longest word of a domain's name that is one token of the base.

    Of each word the form in the name is tried first, then its singular: "my_dogs" gives "dogs" if
    the base has a token for it, else "dog".

    Raises:
        UsageError: there is none; the hint lists similar words.
    """
    words = [word for word in re.split(r"[^a-z]+", name) if word and word not in _STOP_WORDS.split()]
    for word in sorted(words, key=len, reverse=True):
        for form in (word, *_singulars(word)):
            if len(form) > 1 and _tokens(model)(form) == 1:
                return form
    raise UsageError(
        f"no word of {name!r} is one token to the base {model.base.name}",
        hint=f"name them: --descriptor WORD{_like(words, model)}",
    )


def check_descriptor(word: str, model: TextToImageModel) -> str:
    """Return the user's descriptor; `UsageError` lists other words if it is not one token."""
    count = _tokens(model)(word)
    if count == 1:
        return word
    raise UsageError(
        f"the descriptor {printable(word)!r} is {count} tokens to the base {model.base.name}; it has to be one",
        hint=f"a more common word will do{_like(re.split(r'[^a-z]+', word.lower()), model)}",
    )


def _singulars(word: str) -> list[str]:
    """Return the possible singulars of a plural: dogs, boxes, ponies, wolves, mice …"""
    irregular = {"people": "person", "men": "man", "women": "woman", "children": "child"}
    irregular |= {"mice": "mouse", "geese": "goose", "feet": "foot", "teeth": "tooth"}
    found = [irregular[word]] if word in irregular else []
    for ending, singular in (("ies", "y"), ("ves", "f"), ("ves", "fe"), ("es", ""), ("s", "")):
        if word.endswith(ending) and not word.endswith("ss"):
            found.append(word.removesuffix(ending) + singular)
    return sorted(found, key=len, reverse=True)


def _tokens(model: TextToImageModel) -> Callable[[str], int]:
    tokenizer = model.tokenizer
    return lambda word: len(tokenizer(word, add_special_tokens=False, verbose=False).input_ids)


def _like(words: list[str], model: TextToImageModel) -> str:
    """Return ", such as …": similar words that are one token of the base."""
    endings = [token.removesuffix("</w>") for token in model.tokenizer.get_vocab()
               if token.endswith("</w>")]  # fmt: skip
    known = [word for word in endings if len(word) > 2 and re.fullmatch("[a-z]+", word)]
    near: list[str] = []
    for word in sorted(filter(None, words), key=len, reverse=True):
        near += [form for form in _singulars(word) if form in known]
        near += difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    common = [word for word in ("face", "person", "cat", "dog", "art") if word in known]
    chosen = [word for word in dict.fromkeys([*near, *common]) if _tokens(model)(word) == 1][:4]
    return f", such as {', '.join(chosen)}" if chosen else ""


@dataclass(frozen=True, kw_only=True)
class NewDomain:
    """A domain about to be pre-trained for a base.

    Args:
        domain: the value; its descriptor counts unless `names_itself`.
        names_itself: the descriptor is to be found in the name.
        config, tuning: of the pre-training, and of later personalization.
        folder: where the domain weights go.
    """

    domain: Domain
    names_itself: bool
    config: PretrainingConfig
    tuning: TuningConfig
    folder: Path

    @property
    def work(self) -> Path:
        """The folder of checkpoints, logs and contact sheets during the training."""
        return self.folder.with_name(f".{self.folder.name}.checkpoints")


def check_new_name(name: str | Domain) -> None:
    """Raise `UsageError` if no domain can have this name."""
    if isinstance(name, str):
        try:
            check_name(name)
        except ValueError as error:
            raise UsageError(str(error)) from error


def plan_domain(
    name: str | Domain,
    base: str,
    options: DomainTrainingOptions,
    *,
    config: PretrainingConfig | None = None,
    tuning: TuningConfig | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> NewDomain:
    """Decide everything about a new domain that does not need its base.

    Args:
        name: a new domain's, an installed one's that lacks weights for this base, or a value.
        base: name of the base.
        options: its descriptor and config fields replace those of the config.

    Raises:
        UsageError: a value is out of range, or there are such weights already.
    """
    domain, is_new = _find(name, base)
    config = config or domain.pretraining or PretrainingConfig(steps=60_000)
    fields = ("steps", "batch_size", "base_learning_rate", "reg_weight")
    given = {field: getattr(options, field) for field in fields}
    try:
        if options.descriptor is not None:
            domain = replace(domain, descriptor=options.descriptor)
        config = config.replace(**{key: one for key, one in given.items() if one is not None})
    except ValueError as error:
        raise UsageError(str(error)) from error
    target = Path(folder) if folder is not None else user_domains_folder() / domain.name
    if (target / "domain.toml").exists():
        raise UsageError(
            f"there is a domain in {printable(str(target))} already",
            hint=f"choose another name, or remove it: e4t domains rm {domain.name}",
        )
    return NewDomain(
        domain=domain,
        names_itself=is_new and options.descriptor is None,
        config=config,
        tuning=tuning or domain.tuning,
        folder=target,
    )


def _find(name: str | Domain, base: str) -> tuple[Domain, bool]:
    """Return the value, the installed domain of that name, or a new plain one; and which it is."""
    if isinstance(name, Domain):
        return name, False
    installed = installed_domains()
    # A package's domain precedes the user's folder of that name, which holds weights for it.
    for listing in sorted(installed, key=lambda one: one.package == USER):
        if listing.name == name and listing.domain is not None:
            with contextlib.suppress(WeightsUnavailable):
                weights_folder(listing.domain, base)
                raise UsageError(
                    f"the domain {name!r} has weights for {base} already", hint="choose another name with --domain"
                )
            return listing.domain, False
    known = [one.domain for one in installed if one.domain is not None]
    tuning, pretraining = _known_configs(known, base)
    return Domain(name=name, descriptor=name, tuning=tuning, pretraining=pretraining), True


def _known_configs(known: list[Domain], base: str) -> tuple[TuningConfig, PretrainingConfig]:
    """Return the configs that a new domain begins with on a base.

    The paper's learning rates are for Stable Diffusion; domain weights made for this base have
    better ones. Of several, one without a mask and with the default templates is the nearest.
    """
    for domain in sorted(known, key=lambda one: bool(one.prompt_templates)):
        with contextlib.suppress(E4TError):
            made = user_domain(weights_folder(domain, base))
            if made.pretraining is not None and not made.tuning.mask:
                return made.tuning, made.pretraining.replace(mask=False)
    # The paper's values for cats, its domain of objects without masks (section 3.5).
    tuning = TuningConfig(steps=5, base_learning_rate=3e-6, reg_weight=1e-4)
    return tuning, PretrainingConfig(steps=60_000)


CACHES = ("auto", "on", "off")


@dataclass(frozen=True, kw_only=True)
class CacheChoice:
    """Whether encoded images are kept on the disk.

    Args:
        used: whether they are.
        pictures: how many images there are, 0 if unknown.
        size: of the cache, in bytes.
        why: a note for the user if "auto" could not use it, "" otherwise.
    """

    used: bool
    pictures: int
    size: int
    why: str = ""


def check_cache(wanted: str) -> None:
    """Raise `UsageError` if a choice is not one of the three."""
    if wanted not in CACHES:
        raise UsageError(f"there is no cache {printable(wanted)!r}", hint=f"one of {', '.join(CACHES)}")


def how_many(source: ImageSource) -> int:
    """Return the number of a source's images, 0 if unknown."""
    if isinstance(source, MapStyleSource):
        return len(source)
    return source.approximate_len if isinstance(source, IterableSource) else 0


def choose_cache(
    wanted: str, source: ImageSource, model: TextToImageModel, samples: int, *, mask: bool
) -> CacheChoice:
    """Decide whether encoded images are kept; "auto" keeps them if images are used repeatedly.

    Args:
        wanted: "auto", "on" or "off".
        samples: images that the run will train on, repetitions counted.
        mask: whether masks are kept too.

    Raises:
        UsageError: an iterable that can be read once only, and "off".
        ResourceError: "on", and the disk is too small.
    """
    from e4t_cli.pretraining.encoded_images import bytes_per_image

    pictures = how_many(source)
    size = pictures * bytes_per_image(model, mask=mask)
    once = isinstance(source, SinglePassSource)
    if wanted == "off" and once:
        raise UsageError(
            "an iterable can be read once, so its images have to be cached", hint="pass a list, or leave the cache on"
        )
    if wanted == "off" or (wanted == "auto" and not once and not 0 < pictures < samples):
        return CacheChoice(used=False, pictures=pictures, size=size)
    free = free_bytes(user_cache())
    if size > 0.9 * free:
        needed = f"the encoded images need {shown_size(size)}, and {shown_size(free)} are free"
        if wanted == "on":
            raise ResourceError(needed, hint="E4T_CACHE_DIR moves the cache, --cache off trains without it")
        return CacheChoice(used=False, pictures=pictures, size=size, why=f"{needed}: they are not cached")
    return CacheChoice(used=True, pictures=pictures, size=size)


@contextlib.contextmanager
def training_data(
    model: TextToImageModel,
    source: ImageSource,
    reader: ImageReader,
    choice: CacheChoice,
    *,
    processes: DistributedContext,
    on_progress: ProgressCallback,
) -> Iterator[TrainingData]:
    """Yield a source's images as training data.

    Raises:
        InputError: no image can be used, or one cannot and the reader is strict.
    """
    from e4t_cli.pretraining.cache import EncodingCache
    from e4t_cli.pretraining.encoded_images import OnTheFlyDataset, StreamingDataset

    for note in (*source.notes, *([choice.why] if choice.why else [])):
        on_progress(Progress(stage="encode", note=note))
    if choice.used:
        yield EncodingCache(model, reader).encode(
            source, total=choice.pictures, processes=processes, on_progress=on_progress
        )
        return
    for note in reader.notes(choice.pictures or None):
        on_progress(Progress(stage="encode", note=note))
    if isinstance(source, MapStyleSource):
        live: OnTheFlyDataset | StreamingDataset = OnTheFlyDataset(model, source, reader)
    else:
        assert isinstance(source, IterableSource)
        live = StreamingDataset(model, source, reader, processes.rank, processes.count)
    try:
        yield live
    finally:
        live.close()
        for note in reader.notes(None):
            on_progress(Progress(stage="encode", note=note))
