"""What a run writes while it goes on: tables, curve, sheets, and W&B's files, read back"""
import csv
import http.server
import json
import os
import struct
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import ddpo_tutorial.records as records
from ddpo_tutorial.records import Recorder, before_after, finish_wandb, line_of, reward_curve, start_wandb, titled_sheet, write_rows
from ddpo_tutorial.rewards import WeightedSum
from ddpo_tutorial.training import Evaluation, TrainConfig, evaluate, train
from helpers import PROMPTS, brightness, micro_pipeline

SMALL = TrainConfig(num_epochs=3, samples_per_epoch=5, sample_batch_size=2, num_inference_steps=3, updates_per_epoch=2, minibatch_size=4, learning_rate=1e-3, buffer_size=8, min_count=2)

def darkness(images, prompts): return 1 - brightness(images, prompts)

def both(): return WeightedSum(light=(1., brightness), dark=(.5, darkness))

def recorded(folder, config=SMALL, reward=None, **options):
    "Train a micro pipeline with a recorder; the rows, and the last epoch."
    pipe, last = micro_pipeline(), []
    reward = reward or both()
    record = Recorder(folder, config.num_epochs, watch=lambda: evaluate(config, pipe, reward, PROMPTS[:3]), **options)
    rows = train(config, pipe, reward, PROMPTS, lambda epoch: (record(epoch), last.append(epoch)))
    return rows, last

def table(path):
    with path.open(newline='') as f: return list(csv.DictReader(f))

def test_tables_hold_every_epoch_and_every_update(tmp_path):
    rows, last = recorded(tmp_path)
    epochs, updates = table(tmp_path / 'metrics.csv'), table(tmp_path / 'updates.csv')
    assert [{k: float(v) for k, v in r.items()} for r in epochs] == [{k: float(v) for k, v in r.items()} for r in rows]
    assert [(int(u['epoch']), int(u['update'])) for u in updates] == [(e, u) for e in range(3) for u in range(2)] and len(last[-1].state.updates) == 6
    assert {'loss', 'approx_kl', 'clipfrac', 'ratio', 'grad_norm'} <= set(updates[0]) and {'reward_light', 'reward_dark'} <= set(epochs[0])

def test_a_reader_never_sees_half_a_table(tmp_path, monkeypatch):
    "The writer dies in the middle: the old table is still there, whole."
    write_rows(tmp_path / 'a.csv', [dict(x=1)])
    class Dies(csv.DictWriter):
        def writerows(self, rows): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(records.csv, 'DictWriter', Dies)
    with pytest.raises(OSError): write_rows(tmp_path / 'a.csv', [dict(x=1), dict(x=2)])
    assert (tmp_path / 'a.csv').read_text().split() == ['x', '1']

def test_a_reader_in_the_middle_has_the_old_table(tmp_path):
    "Renamed, not written over: whoever has the file open reads on in the old one."
    write_rows(tmp_path / 'a.csv', [dict(x=i) for i in range(9)])
    with (tmp_path / 'a.csv').open() as reader:
        write_rows(tmp_path / 'a.csv', [dict(y=0)])
        assert reader.read().split() == ['x', *map(str, range(9))] and (tmp_path / 'a.csv').read_text().split() == ['y', '0']

def test_pictures_are_refreshed_and_fixed(tmp_path):
    "The sheet shows the watched prompts; without learning it is the same picture after every epoch, whatever training draws."
    sheets, pipe = [], micro_pipeline()
    config = replace(SMALL, learning_rate=1e-12)
    record = Recorder(tmp_path, 3, watch=lambda: evaluate(config, pipe, brightness, PROMPTS[:3]))
    train(config, pipe, brightness, PROMPTS, lambda epoch: (record(epoch), sheets.append(np.asarray(Image.open(tmp_path / 'samples.png')))))
    assert len(sheets) == 3 and all(np.abs(s.astype(int) - sheets[0]).max() <= 1 for s in sheets)
    Image.open(tmp_path / 'reward_curve.png').verify()

def test_without_watching_the_sheet_shows_the_samples(tmp_path):
    record, last = Recorder(tmp_path, 1), []
    train(replace(SMALL, num_epochs=1), micro_pipeline(), brightness, PROMPTS, lambda epoch: (record(epoch), last.append(epoch)))
    assert np.array_equal(np.asarray(Image.open(tmp_path / 'samples.png')), np.asarray(titled_sheet(last[0].batch)))

def test_line_and_curve():
    rows = [dict(epoch=e, reward_mean=e + .5, reward_std=.25, approx_kl=1e-7, clipfrac=.5, seconds=2.) for e in range(3)]
    assert all(w in line_of(rows[2], 9) for w in ('3/9', '2.500', '0.250', '1.0e-07', '0.50', '2.0 s'))
    top, bottom = reward_curve(rows).axes
    assert top.lines[0].get_xydata().tolist() == [[1, .5], [2, 1.5], [3, 2.5]] and len(bottom.lines[0].get_xydata()) == 3

def test_before_stands_above_after():
    "Rows in turn, eight a row: a picture and what became of it are one above the other."
    n = 10
    before, after = (Evaluation([f'p{i}' for i in range(n)], torch.full((n, 3, 16, 16), c), torch.zeros(n)) for c in (0., 1.))
    page = np.asarray(before_after(before, after).convert('L')).astype(int)
    heights = np.array_split(np.arange(len(page)), 4)
    assert [page[h[20], 50] for h in heights] == [0, 255, 0, 255]

# W&B

def log_records(path):
    "The protocol messages of a .wandb file: LevelDB's log format behind a header of 7 bytes."
    data, position, parts = path.read_bytes(), 7, []
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7: position += left; continue
        _, length, kind = struct.unpack('<IHB', data[position:position + 7])
        parts.append(data[position + 7:position + 7 + length]); position += 7 + length
        if kind in (1, 4): yield b''.join(parts); parts = []

def messages(path):
    "All messages of a file, when its last one has reached the disk."
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record
    for _ in range(40):
        try: found = list(map(Record.FromString, log_records(path)))
        except DecodeError: found = []
        if any(m.HasField('exit') for m in found): return found
        time.sleep(.5)
    raise AssertionError(f'{path} was not finished within 20 seconds')

def read_back(folder):
    "What W&B will send: the settings, and one dictionary for each call of log, in which a picture or a histogram is spread over keys such as rewards/_type."
    config, history = {}, []
    for path in sorted(folder.glob('wandb/offline-run-*/*.wandb')):
        for message in messages(path):
            if message.HasField('history'): history.append({(i.key or '/'.join(i.nested_key)): json.loads(i.value_json) for i in message.history.item})
            for item in message.run.config.update: config[item.key or '/'.join(item.nested_key)] = json.loads(item.value_json)
    return config, history

@pytest.fixture(scope='module')
def tracked(tmp_path_factory):
    "An offline run, finished."
    folder = tmp_path_factory.mktemp('tracked')
    tracking = start_wandb('offline', folder, dict(seed=7, model='micro'))
    rows, last = recorded(folder, tracking=tracking)
    finish_wandb(tracking)
    return folder, tracking.id, rows, last

def test_wandb_gets_one_call_a_step(tracked):
    "Pitfall 33: a call for each number would make 36 steps of an epoch."
    folder, _, rows, last = tracked
    config, history = read_back(folder)
    assert config['seed'] == 7 and [h['_step'] for h in history] == list(range(6))
    for h, u in zip(history, last[-1].state.updates):
        for name in ('loss', 'approx_kl', 'clipfrac', 'ratio', 'grad_norm'): assert h[name] == pytest.approx(u[name], rel=1e-6, abs=1e-12)
        assert h['learning_rate'] == 1e-3

def test_wandb_gets_the_epoch_with_its_last_step(tracked):
    folder, _, rows, last = tracked
    history = read_back(folder)[1]
    whole = [h for h in history if 'reward_mean' in h]
    assert [h['_step'] for h in whole] == [1, 3, 5]
    for h, row, epoch in zip(whole, rows, last):
        for name in ('reward_mean', 'reward_std', 'reward_light', 'reward_dark', 'per_prompt'): assert h[name] == pytest.approx(row[name], rel=1e-6)
        assert h['samples_per_second'] == pytest.approx(5 / row['seconds'], rel=1e-6)
        assert h['rewards/_type'] == h['advantages/_type'] == 'histogram' and sum(h['advantages/values']) == 5

def test_wandb_gets_pictures_of_the_same_prompts(tracked):
    folder, _, rows, last = tracked
    shown = [h for h in read_back(folder)[1] if 'pictures/count' in h]
    assert len(shown) == 3
    for h in shown: assert h['pictures/count'] == 3 and [c.split(':')[0] for c in h['pictures/captions']] == PROMPTS[:3]
    assert len(list(folder.glob('wandb/offline-run-*/files/media/images/*.png'))) == 9

def test_wandb_gets_each_row_at_once(tmp_path):
    "Without commit the last row of an epoch, with its rewards and pictures, would wait for the next epoch."
    class Listener:
        def __init__(self): self.calls = []
        def log(self, row, step, commit=False): self.calls.append((step, commit))
    listener = Listener()
    recorded(tmp_path, replace(SMALL, num_epochs=1), tracking=listener)
    assert listener.calls == [(0, True), (1, True)]

def test_wandb_goes_on_with_the_same_run(tracked):
    folder, run_id, *_ = tracked
    again = start_wandb('offline', folder, dict(seed=7), run_id)
    assert again.id == run_id
    finish_wandb(again)

def test_off_is_off(tmp_path):
    assert start_wandb('off', tmp_path, {}) is None and list(tmp_path.iterdir()) == []

@pytest.fixture
def deaf_server():
    "A server that has nothing of what it is asked for."
    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self): self.send_response(404); self.send_header('Content-Length', '0'); self.end_headers()
        do_GET = do_POST = answer
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()

ONLINE = """
import sys, time
from pathlib import Path
from ddpo_tutorial.records import finish_wandb, start_wandb
began = time.perf_counter()
tracking = start_wandb('online', Path(sys.argv[1]), {}, sys.argv[2] or None)
print('mode', tracking.settings.mode, tracking.id)
tracking.log(dict(x=1)); finish_wandb(tracking)
print('seconds', time.perf_counter() - began)
"""

@pytest.mark.parametrize('key, run_id, words', [('', '', 'no key'), ('a' * 40, '', 'did not answer'), ('a' * 40, 'abcd1234', 'did not answer'), ('a' * 40, 'abcd1234', 'CommError')])
def test_without_a_key_or_a_network_it_is_offline(tmp_path, deaf_server, key, run_id, words):
    "In a process of its own, to its end: neither the start nor the exit may stall. Nobody listens at the server's address, or somebody who knows nothing of W&B."
    url = 'http://127.0.0.1:9' if words == 'did not answer' else deaf_server
    env = {k: v for k, v in os.environ.items() if k not in ('WANDB_API_KEY', 'WANDB_MODE')} | dict(WANDB_BASE_URL=url, NETRC=str(tmp_path / 'none'), HOME=str(tmp_path), **dict(WANDB_API_KEY=key) if key else {})
    began = time.perf_counter()
    done = subprocess.run([sys.executable, '-c', ONLINE, tmp_path, run_id], env=env, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0 and words in done.stdout and ('mode offline ' + (run_id if words == 'did not answer' else '')) in done.stdout, done.stdout + done.stderr
    assert time.perf_counter() - began < 90 and len(list(tmp_path.glob('wandb/offline-run-*/*.wandb'))) == 1

def test_trouble_with_wandb_does_not_stop_training(tmp_path, capsys):
    class Broken:
        def log(self, *args, **options): raise ConnectionError('gone')
    rows, _ = recorded(tmp_path, tracking=Broken())
    assert len(rows) == 3 and capsys.readouterr().out.count('W&B could not log epoch') == 3

def test_the_end_does_not_wait_for_ever(capsys):
    class Slow:
        def finish(self): time.sleep(5)
    began = time.perf_counter()
    finish_wandb(Slow(), seconds=.2)
    assert time.perf_counter() - began < 2 and 'wandb sync' in capsys.readouterr().out
