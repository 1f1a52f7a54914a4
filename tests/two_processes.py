"""What test_processes.py starts twice with torchrun: both processes do this, the first writes what was found to the file it is given"""
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

import ddpo_tutorial.training as training
from ddpo_tutorial.checkpoints import load_checkpoint, newest_checkpoint, save_checkpoint
from ddpo_tutorial.pipelines import Context
from ddpo_tutorial.processes import Team
from ddpo_tutorial.rewards import WeightedSum
from ddpo_tutorial.sampling import Trajectory
from ddpo_tutorial.training import Alone, Batch, TrainConfig, collect, new_state, train, update
from helpers import PROMPTS, brightness, generator, micro_pipeline, weights

SMALL = TrainConfig(num_epochs=3, samples_per_epoch=8, sample_batch_size=3, num_inference_steps=3, updates_per_epoch=2, minibatch_size=5, learning_rate=1e-3, buffer_size=8, min_count=2)

class Deaf(Team):
    "A team that forgets to add up its gradients."
    def add_up(self, tensors): pass

def rows(batch, own):
    "Some samples of a batch."
    (text, empty), (latents, timesteps, log_probs) = batch.context, batch.trajectory
    return Batch([batch.prompts[i] for i in own], Context(text[own], empty), Trajectory(latents[:, own], timesteps, log_probs[:, own]), batch.images[own], batch.rewards[own], {})

def everywhere(team, values):
    "A vector of this process, as the list of every process's."
    return team.gather(values.double()).view(team.size, -1)

def refused(team):
    "What this process hears when the first one finds an error."
    def find(): raise ValueError('nonsense')
    try: team.agree(find)
    except ValueError as error: return team.gather(torch.tensor([float(str(error) == 'nonsense')])).tolist()

def stepped(batch, advantages, team, max_grad_norm):
    "How one step of plain gradient descent, of about the length 1, changes the weights, and the statistics of the update."
    pipe, config = micro_pipeline(), replace(SMALL, updates_per_epoch=1, max_grad_norm=max_grad_norm)
    before = weights(pipe.unet)
    stats, = update(config, pipe, torch.optim.SGD(pipe.unet.parameters(), lr=1 / max_grad_norm if max_grad_norm < 1 else 1.), batch, advantages, generator(1), None, team)
    return weights(pipe.unet) - before, stats

def one_update(team, max_grad_norm):
    "All samples alone against half of them in each of two processes."
    pipe, prompts = micro_pipeline(), (PROMPTS * 2)[:8]
    batch, advantages = collect(SMALL, pipe, brightness, prompts, generator()), torch.linspace(-1, 2, 8)
    (alone, a), (together, b) = stepped(batch, advantages, Alone(), max_grad_norm), stepped(rows(batch, team.share(list(range(8)))), team.share(advantages), team, max_grad_norm)
    return dict(apart=((alone - together).norm() / alone.norm()).item(), length=alone.norm().item(), stats=[a, b])

def weights_after_updates(team):
    "Are the weights equal in all processes, after every update of a training?"
    pipe, equal = micro_pipeline(), []
    original = training.step_with
    def step(optimizer, scaler):
        original(optimizer, scaler)
        first, *others = everywhere(team, weights(pipe.unet))
        equal.append(all(torch.equal(first, o) for o in others))
    training.step_with = step
    try: train(SMALL, pipe, brightness, PROMPTS, team=team)
    finally: training.step_with = original
    return equal

def one_epoch(team):
    "Which prompts and rewards each process had, with which advantages it learned, what both know of all, and whether noise differed."
    pipe, seen, used, original = micro_pipeline(), [], [], training.gradients
    state = new_state(SMALL, pipe)
    reward = WeightedSum(light=(1., brightness), dark=(2., lambda images, prompts: -brightness(images, prompts)))
    training.gradients = lambda *args: used.append(torch.as_tensor(args[4])) or original(*args)
    try: train(replace(SMALL, num_epochs=1), pipe, reward, PROMPTS, seen.append, state, team)
    finally: training.gradients = original
    batch = seen[0].batch
    known = torch.tensor([r for b in state.tracker.buffers.values() for r in b])
    return dict(prompts=team.gather(torch.tensor([PROMPTS.index(p) for p in batch.prompts])).tolist(), rewards=team.gather(batch.rewards).tolist(),
        known=everywhere(team, known).tolist(), row=state.rows[0], noise=team.gather(batch.trajectory.latents[0].mean((1, 2, 3))).tolist(), advantages=seen[0].advantages.tolist(), used=team.gather(used[0]).tolist(),
        generators=everywhere(team, state.generator.get_state().double()).diff(dim=0).abs().max().item())

def trained(team, folder, epochs):
    "Train with checkpoints, from the newest one; metrics without times, and weights."
    pipe = micro_pipeline(); state = new_state(SMALL, pipe)
    if found := newest_checkpoint(folder): load_checkpoint(found, pipe, state)
    def keep(epoch):
        if team.rank == 0: save_checkpoint(folder, pipe, state, SMALL)
    train(replace(SMALL, num_epochs=epochs), pipe, brightness, PROMPTS, keep, state, team)
    return [{k: v for k, v in row.items() if k != 'seconds'} for row in state.rows], weights(pipe.unet)

def resumed(team, folder):
    "Three epochs, and one and two more."
    through, a = trained(team, folder / 'through', 3)
    trained(team, folder / 'parts', 1); team.any(False) # all wait for the checkpoint
    parts, b = trained(team, folder / 'parts', 3)
    return dict(rows=through == parts, weights=torch.equal(a, b))

if __name__ == '__main__':
    out, team = Path(sys.argv[1]), Team(cpu=True)
    found = dict(size=team.size, agree=team.agree(lambda: f'from {team.rank}'), refused=refused(team), any=[team.any(False), team.any(team.rank == 1)],
        updates=[one_update(team, norm) for norm in (1e9, 1e-3)], equal=weights_after_updates(team), deaf=weights_after_updates(Deaf(cpu=True)),
        epoch=one_epoch(team), resumed=resumed(team, out.parent / 'checkpoints'))
    if team.rank == 0: out.write_text(json.dumps(found))
