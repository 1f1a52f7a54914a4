"""What a run of the benchmark is given, the models it measures, and what it writes down about where
it ran"""

import os
import platform
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ddpo_tutorial.pipelines import load_pipeline
from ddpo_tutorial.prompts import fill_template, simple_animals

sys.path.append(str(Path(__file__).parents[1]))  # tests/, for sd_shape
from sd_shape import sd_shaped_pipeline  # noqa: E402

LIBRARIES = (
    'ddpo_tutorial',
    'torch',
    'diffusers',
    'transformers',
    'accelerate',
    'peft',
    'trl',
    'fastprogress',
)


@dataclass
class Settings:
    "The numbers of a run. `for_device` fills them in."

    device: str  # 'cpu' or 'cuda'
    model: str  # 'tiny', or 'sd': Stable Diffusion v1.4's shape with random weights
    image_size: int  # pixels a side, of 'sd'
    batch_sizes: tuple  # of the identical work
    steps: int  # DDIM steps of the identical work
    recipe: dict  # samples, sample_batch_size and steps of an epoch of the original recipe
    repeats: int = 5  # timed rounds, at least
    quick: bool = False  # see that it runs; the numbers mean little
    guidance_scale: float = 2.0  # of the identical work

    def pipeline(
        self,
        dtype: torch.dtype = torch.float32,  # of all weights
    ):  # StableDiffusionPipeline, the same weights at every call
        "The model that is measured."
        if self.model == 'tiny':
            return load_pipeline('tiny', self.device, dtype)
        return sd_shaped_pipeline(self.image_size, self.device, dtype)

    def prompts(
        self,
        n: int,  # how many
    ) -> list[str]:  # the animals of the paper, again from the first when they are used up
        "Prompts to measure with."
        animals = fill_template(simple_animals())
        return (animals * -(-n // len(animals)))[:n]


def for_device(
    device: str,  # 'cpu' or 'cuda'
    repeats: int = 5,  # timed rounds, at least
    quick: bool = False,  # smaller and fewer
    model: str | None = None,  # by default tiny on a CPU, sd on CUDA
    image_size: int = 512,  # of sd
) -> Settings:  # complete
    """What fits a device: on a CPU the tiny model and an epoch of the recipe scaled down, on CUDA
    Stable Diffusion's shape and the recipe's own numbers."""
    small = device == 'cpu'
    recipe = (
        dict(samples=32, sample_batch_size=32, steps=10)
        if small
        else dict(samples=128, sample_batch_size=32, steps=50)
    )
    batch_sizes = (1, 4, 16, 64) if small else (1, 4, 16)
    steps = 10
    if quick:
        batch_sizes = (1, 4)
        steps = 3
        recipe = dict(samples=8, sample_batch_size=4, steps=3)
    return Settings(
        device=device,
        model=model or ('tiny' if small else 'sd'),
        image_size=image_size,
        batch_sizes=batch_sizes,
        steps=steps,
        recipe=recipe,
        repeats=repeats,
        quick=quick,
    )


def installed(
    name: str,  # a distribution
) -> str | None:  # its version
    "The version of a library, None where it is not installed."
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def describe(
    settings: Settings,  # of the run
) -> dict:  # numbers and words, for the JSON and the head of the table
    "Where and with what a part was measured; nothing that names the machine."
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    hardware = torch.cuda.get_device_name() if settings.device == 'cuda' else f'{cores} CPU cores'
    return dict(
        hardware=hardware,
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        **{name: installed(name) for name in LIBRARIES},
        settings=asdict(settings),
    )
