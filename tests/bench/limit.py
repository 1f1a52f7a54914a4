"""Against the limit: achieved operations a second over those of a large matrix product; and what a LoRA needs in memory"""
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from ddpo_tutorial.configs import Config
from ddpo_tutorial.pipelines import Context, add_lora, compute_dtype, encode_prompts, save_memory
from ddpo_tutorial.sampling import make_generators, predict, sample
from ddpo_tutorial.training import autocast, collect, new_state, train, update

from recipe import brightness
from timing import give_back, in_turn, peak_growth, print_row, ratios

BACKWARD = 2 # a backward pass costs as much as two forward passes; checkpointing adds one forward pass


class Product:
    "A product of two square matrices, several times: what the device can do at best."
    def __init__(self,
        device: str, # 'cpu' or 'cuda'
    ):
        self.size, self.times, self.dtype = (8192, 20, torch.bfloat16) if device == 'cuda' else (2048, 4, torch.float32)
        self.a, self.b = (torch.randn(self.size, self.size, device=device, dtype=self.dtype) for _ in range(2))
        self.out = torch.empty_like(self.a)
        self.flops = 2 * self.size**3 * self.times

    def __call__(self):
        "Multiply."
        for _ in range(self.times): torch.mm(self.a, self.b, out=self.out)


@torch.no_grad()
def predict_flops(
    pipe, # StableDiffusionPipeline
    context: Context, # of B prompts
    guidance_scale: float, # above 1: two forward passes a sample
) -> int: # floating-point operations; a multiply-add counts as two
    "What one guided prediction for B samples costs: matrix products, convolutions and attention, counted while they run."
    side, n = pipe.unet.config.sample_size, len(context.text)
    x = torch.randn(n, pipe.unet.config.in_channels, side, side, device=pipe.device)
    with FlopCounterMode(display=False) as counter, autocast(Config(), pipe):
        predict(pipe.unet, x, torch.tensor(500, device=pipe.device), context, guidance_scale)
    return counter.get_total_flops()


def fraction(
    case: str, # what is measured
    work, # a function without arguments
    flops: int, # it does
    product: Product, # the limit
    settings, # device and repeats
) -> dict: # a row
    "Time work and matrix products in turn; TFLOP/s of both and their ratio in each round."
    try: times = in_turn(dict(work=work, product=product), settings.device, settings.repeats)
    except torch.OutOfMemoryError: return dict(case=case, note='does not fit into this memory')
    tflops = dict(work=[flops / s / 1e12 for s in times['work']], product=[product.flops / s / 1e12 for s in times['product']])
    row = dict(case=case, flops=flops, times=times, tflops=tflops, ratios=ratios(tflops, 'work', 'product'),
               memory=dict(work=peak_growth(work, settings.device)))
    print_row('limit', row, 'of the product')
    return row


def sampling_rows(
    settings, # of the run
    product: Product, # the limit
) -> list[dict]: # a row for each batch size
    "Sampling in the package's own precision: nothing but forward passes."
    pipe, rows = settings.pipeline(), []
    for batch in settings.batch_sizes:
        context, generators = encode_prompts(pipe, settings.prompts(batch)), make_generators(range(batch))
        flops = settings.steps * predict_flops(pipe, context, settings.guidance_scale)
        def work():
            with autocast(Config(), pipe): sample(pipe, context, generators, settings.steps, settings.guidance_scale)
        rows.append(fraction(f'sampling, batch {batch}', work, flops, product, settings))
    return rows


def training_row(
    settings, # of the run
    product: Product, # the limit
    minibatch: int, # pairs a forward pass
    checkpointing: bool = False, # one forward pass more
) -> dict: # a row
    "An update of 4 samples: forward and backward passes of all (sample, timestep) pairs, the norm clipped, one AdamW step."
    pipe = save_memory(settings.pipeline(), gradient_checkpointing=checkpointing)
    config = Config(samples_per_epoch=4, updates_per_epoch=1, num_inference_steps=settings.recipe['steps'],
                    guidance_scale=settings.guidance_scale, minibatch_size=minibatch)
    batch = collect(config, pipe, brightness, settings.prompts(4), list(range(4)))
    flops = config.num_inference_steps * predict_flops(pipe, batch.context, config.guidance_scale) * (1 + BACKWARD + checkpointing)
    state, rng = new_state(config, pipe), np.random.default_rng(0)
    def work(): update(config, pipe, state, batch, torch.linspace(-1, 2, 4), rng)
    return fraction(f'training, minibatch {minibatch}' + ', checkpointing' * checkpointing, work, flops, product, settings)


def limit_part(
    settings, # of the run
) -> list[dict]: # a row for each case
    "Sampling and training against the matrix product."
    product = Product(settings.device)
    rows = sampling_rows(settings, product)
    for minibatch in settings.batch_sizes:
        rows.append(training_row(settings, product, minibatch))
        give_back()
    if settings.device == 'cuda': rows.append(training_row(settings, product, max(settings.batch_sizes), checkpointing=True))
    return rows


def weights_bytes(
    pipe, # StableDiffusionPipeline
) -> int: # bytes
    "The size of all weights."
    return sum(p.numel() * p.element_size() for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters())


def lora_row(
    settings, # of the run
    minibatch: int, # pairs a forward pass
    checkpointing: bool, # of the UNet
) -> dict: # a row
    "Peak memory of everything a LoRA of rank 4 needs: weights, sampling and decoding one by one, training."
    pipe = save_memory(add_lora(settings.pipeline(compute_dtype(settings.device)), 4), gradient_checkpointing=checkpointing)
    config = Config(num_epochs=1, samples_per_epoch=4, sample_batch_size=1, updates_per_epoch=1, num_inference_steps=3,
                    minibatch_size=minibatch)
    case = f'LoRA, minibatch {minibatch}' + ', checkpointing' * checkpointing
    give_back()
    try: growth = peak_growth(lambda: train(config, pipe, brightness, settings.prompts(4)), settings.device)
    except torch.OutOfMemoryError: return dict(case=case, note='does not fit into this memory')
    if settings.device != 'cuda': return dict(case=case, peak_bytes=growth + weights_bytes(pipe))
    return dict(case=case, peak_bytes=torch.cuda.max_memory_allocated(), reserved_bytes=torch.cuda.max_memory_reserved())


def lora_part(
    settings, # of the run
) -> list[dict]: # a row for each minibatch size
    "Which minibatches of a LoRA fit into 8 GB, without and with checkpointing."
    rows = []
    for checkpointing in (False, True):
        for minibatch in (1, 2) if settings.quick else (1, 2, 4, 8):
            rows.append(lora_row(settings, minibatch, checkpointing))
            give_back()
            print(f'lora, {rows[-1]}', flush=True)
    return rows
