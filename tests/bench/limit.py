"""Against the limit: achieved operations a second over those of a large matrix product; and what a
LoRA needs in memory"""

import numpy as np
import torch
from recipe import brightness
from timing import give_back, in_turn, peak_growth, print_row, ratios
from torch.utils.flop_counter import FlopCounterMode

from ddpo_tutorial.configs import Config
from ddpo_tutorial.pipelines import add_lora, compute_dtype, encode_prompts, save_memory
from ddpo_tutorial.sampling import Context, DDIMPolicy, make_generators, sample
from ddpo_tutorial.training import collect, new_state, policy_for, train, update

# a backward pass costs as much as two forward passes; checkpointing adds one forward pass
BACKWARD = 2


class Product:
    "A product of two square matrices, several times: what the device can do at best."

    def __init__(
        self,
        device: str,  # 'cpu' or 'cuda'
    ):
        on_gpu = device == 'cuda'
        size = 8192 if on_gpu else 2048
        how = dict(device=device, dtype=torch.bfloat16 if on_gpu else torch.float32)
        self.a = torch.randn(size, size, **how)
        self.b = torch.randn(size, size, **how)
        self.out = torch.empty_like(self.a)
        self.times = 20 if on_gpu else 4
        self.flops = 2 * size**3 * self.times

    def __call__(self):
        "Multiply."
        for _ in range(self.times):
            torch.mm(self.a, self.b, out=self.out)


@torch.no_grad()
def predict_flops(
    policy: DDIMPolicy,  # its UNet and guidance
    context: Context,  # of B prompts
) -> int:  # floating-point operations; a multiply-add counts as two
    """What one guided prediction for B samples costs: matrix products, convolutions and attention,
    counted while they run."""
    x = policy.first_latents(make_generators(range(len(context.text))))
    with FlopCounterMode(display=False) as counter:
        policy.gaussian(0, x, context)
    return counter.get_total_flops()


def fraction(
    case: str,  # what is measured
    work,  # a function without arguments
    flops: int,  # it does
    product: Product,  # the limit
    settings,  # device and repeats
) -> dict:  # a row
    "Time work and matrix products in turn; TFLOP/s of both and their ratio in each round."
    try:
        times = in_turn(dict(work=work, product=product), settings.device, settings.repeats)
    except torch.OutOfMemoryError:
        return dict(case=case, note='does not fit into this memory')
    tflops = dict(
        work=[flops / s / 1e12 for s in times['work']],
        product=[product.flops / s / 1e12 for s in times['product']],
    )
    row = dict(
        case=case,
        flops=flops,
        times=times,
        tflops=tflops,
        ratios=ratios(tflops, 'work', 'product'),
        memory=dict(work=peak_growth(work, settings.device)),
    )
    print_row('limit', row, 'of the product')
    return row


def sampling_rows(
    settings,  # of the run
    product: Product,  # the limit
) -> list[dict]:  # a row for each batch size
    "Sampling in the package's own precision: nothing but forward passes."
    pipe = settings.pipeline()
    config = Config(num_inference_steps=settings.steps, guidance_scale=settings.guidance_scale)
    policy = policy_for(config, pipe)
    rows = []
    for batch in settings.batch_sizes:
        context = encode_prompts(pipe, settings.prompts(batch))
        generators = make_generators(range(batch))
        flops = settings.steps * predict_flops(policy, context)

        def work():
            sample(policy, context, generators)

        case = f'sampling, batch {batch}'
        rows.append(fraction(case, work, flops=flops, product=product, settings=settings))
    return rows


def training_row(
    settings,  # of the run
    product: Product,  # the limit
    minibatch: int,  # pairs a forward pass
    checkpointing: bool = False,  # one forward pass more
) -> dict:  # a row
    """An update of 4 samples: forward and backward passes of all (sample, timestep) pairs, the norm
    clipped, one AdamW step."""
    pipe = save_memory(settings.pipeline(), gradient_checkpointing=checkpointing)
    config = Config(
        samples_per_epoch=4,
        updates_per_epoch=1,
        num_inference_steps=settings.recipe['steps'],
        guidance_scale=settings.guidance_scale,
        minibatch_size=minibatch,
    )
    policy = policy_for(config, pipe)
    batch = collect(config, policy, brightness, prompts=settings.prompts(4))
    batch = batch._replace(advantages=torch.linspace(-1, 2, 4, device=pipe.device))
    passes = config.num_inference_steps * (1 + BACKWARD + checkpointing)
    flops = passes * predict_flops(policy, batch.trajectory.context)
    state = new_state(config, pipe)
    rng = np.random.default_rng(0)

    def work():
        update(config, policy, state, batch, rng=rng)

    case = f'training, minibatch {minibatch}' + ', checkpointing' * checkpointing
    return fraction(case, work, flops=flops, product=product, settings=settings)


def limit_part(
    settings,  # of the run
) -> list[dict]:  # a row for each case
    "Sampling and training against the matrix product."
    product = Product(settings.device)
    rows = sampling_rows(settings, product)
    for minibatch in settings.batch_sizes:
        rows.append(training_row(settings, product, minibatch))
        give_back()
    if settings.device == 'cuda':
        rows.append(training_row(settings, product, max(settings.batch_sizes), checkpointing=True))
    return rows


def weights_bytes(
    pipe,  # StableDiffusionPipeline
) -> int:  # bytes
    "The size of all weights."
    return sum(
        p.numel() * p.element_size()
        for part in (pipe.unet, pipe.vae, pipe.text_encoder)
        for p in part.parameters()
    )


def lora_row(
    settings,  # of the run
    minibatch: int,  # pairs a forward pass
    checkpointing: bool,  # of the UNet
) -> dict:  # a row
    """Peak memory of everything a LoRA of rank 4 needs: weights, sampling and decoding one by one,
    training."""
    pipe = save_memory(
        add_lora(settings.pipeline(compute_dtype(settings.device)), 4),
        gradient_checkpointing=checkpointing,
    )
    config = Config(
        num_epochs=1,
        samples_per_epoch=4,
        sample_batch_size=1,
        updates_per_epoch=1,
        num_inference_steps=3,
        minibatch_size=minibatch,
    )
    case = f'LoRA, minibatch {minibatch}' + ', checkpointing' * checkpointing
    give_back()
    try:
        growth = peak_growth(
            lambda: train(config, pipe, brightness, prompts=settings.prompts(4)), settings.device
        )
    except torch.OutOfMemoryError:
        return dict(case=case, note='does not fit into this memory')
    if settings.device != 'cuda':
        return dict(case=case, peak_bytes=growth + weights_bytes(pipe))
    return dict(
        case=case,
        peak_bytes=torch.cuda.max_memory_allocated(),
        reserved_bytes=torch.cuda.max_memory_reserved(),
    )


def lora_part(
    settings,  # of the run
) -> list[dict]:  # a row for each minibatch size
    "Which minibatches of a LoRA fit into 8 GB, without and with checkpointing."
    rows = []
    for checkpointing in (False, True):
        for minibatch in (1, 2) if settings.quick else (1, 2, 4, 8):
            rows.append(lora_row(settings, minibatch, checkpointing))
            give_back()
            print(f'lora, {rows[-1]}', flush=True)
    return rows
