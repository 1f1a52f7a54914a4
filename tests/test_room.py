"""What a room of people needs: a gallery that holds a class, one run a person, nothing executed of
what somebody handed in; the teacher's commands; the plan's minutes; the pages' links.

Run: python -m pytest tests/test_room.py -n 0
"""

import html
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest
from test_gates import MODULES, NOTEBOOKS, cells, source
from test_lessons import LINES, WORDS

from ddpo_tutorial.configs import load_config, write_config
from ddpo_tutorial.exercises import lesson_file
from ddpo_tutorial.predictors import own_reward
from ddpo_tutorial.reports import write_rows

ROOT = Path(__file__).parents[1]
ROOM = ROOT / 'nbs' / 'room'
PAGE = (ROOM / 'WORKSHOP.md').read_text(encoding='utf-8')
PLAN = [
    [cell.strip() for cell in line.strip('|').split('|')]
    for line in PAGE.splitlines()
    if re.match(r'\| \d+ to \d+ ', line)
]
LINK = re.compile(r'\[[^]]*\]\(([^)]+\.ipynb)\)')


def make_run(folder, reward='aesthetic', gain=2.0, when=0, **changes):
    "A run as it is handed in: settings, tables, a real sheet."
    folder.mkdir(parents=True)
    write_config(load_config('tiny', reward=reward, **changes), folder / 'config.yaml')
    rows = [dict(epoch=i, reward_mean=5 + i * gain / 10, reward_std=0.4) for i in range(9)]
    write_rows(folder / 'metrics.csv', rows)
    (folder / 'evaluation.json').write_text(json.dumps(dict(gain_in_std=gain)))
    os.utime(folder / 'evaluation.json', (when + 1e9, when + 1e9))
    shutil.copy(ROOT / 'nbs' / 'images' / 'tiny_trained.png', folder / 'before_after.png')
    return folder


def make_room(folder, people):
    "A smoke run and two others for each, with as many rewards as people."
    smoke = dict(num_epochs=2, samples_per_epoch=16)
    for i in range(people):
        make_run(folder / f'person-{i}' / 'a', when=9, **smoke)
        make_run(folder / f'person-{i}' / 'b', when=1, gain=i % 7)
        make_run(folder / f'person-{i}' / 'c', when=2, gain=i % 7 / 3, reward=f'mine:reward_{i}')


@pytest.fixture
def gallery(monkeypatch):
    "Runs the gallery's cells on a folder, and returns its names."
    monkeypatch.setattr(plt, 'show', lambda: None)
    matplotlib.use('agg')

    def run(folder):
        monkeypatch.setenv('RUNS', str(folder))
        names = {}
        for cell in cells(ROOM / '02_gallery.ipynb'):
            exec(source(cell), names)
        return names

    yield run
    plt.close('all')


def legends():
    axes = [ax for number in plt.get_fignums() for ax in plt.figure(number).axes]
    return [len(ax.get_legend().get_texts()) for ax in axes if ax.get_legend()]


@pytest.mark.parametrize('people, expected', [(3, [3, 3]), (20, []), (60, [])])
def test_a_class_fits_into_the_plots(people, expected, gallery, tmp_path):
    "A legend of more than eight lines would cover the plot, so there is none."
    make_room(tmp_path, people)
    names = gallery(tmp_path)
    assert len(names['shown']) == people
    assert legends() == expected
    assert all(len(run.sheet) < 60_000 for run in names['shown'])


@pytest.mark.slow
@pytest.mark.parametrize('people', [20, 60])
def test_a_class_fits_on_the_page(people, tmp_path):
    "The page that the teacher's command makes."
    make_room(tmp_path / 'all_runs', people)
    (command,) = re.findall(r'^RUNS=all_runs jupyter nbconvert (.*) nbs/room/', PAGE, re.M)
    words = command.replace('--output-dir .', f'--output-dir {tmp_path}').split()
    done = subprocess.run(
        [sys.executable, '-m', 'nbconvert', *words, ROOM / '02_gallery.ipynb'],
        env=os.environ | dict(RUNS=str(tmp_path / 'all_runs')),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    page = (tmp_path / '02_gallery.html').read_text(encoding='utf-8')
    assert 'Warning' not in html.unescape(page)
    assert page.count('data:image/jpeg') == people and len(page) <= 5e6


def test_a_person_is_shown_by_the_newest_run_that_is_no_smoke_run(gallery, tmp_path, capsys):
    "In a folder, in a folder of folders, or packed. Whoever has none is named."
    make_room(tmp_path, 1)
    make_run(tmp_path / 'ben', gain=1.5)
    packed = make_run(tmp_path / 'runs' / 'x', gain=0.5)
    with tarfile.open(tmp_path / 'eva.tar.gz', 'w:gz') as file:
        file.add(packed, 'runs/x')
    shutil.rmtree(tmp_path / 'runs')
    make_run(tmp_path / 'dan', num_epochs=1)  # smaller than a smoke run's pictures
    write_config(load_config('smoke'), tmp_path / 'dan' / 'config.yaml')
    (make_run(tmp_path / 'gil') / 'before_after.png').write_bytes(b'')
    make_run(tmp_path / 'ida', gain=float('nan'))
    (tmp_path / 'jan.tar.gz').write_bytes(b'damaged')
    shown = gallery(tmp_path)['shown']
    found = {run.name: run.settings['reward'] for run in shown}
    assert found == {'ben': 'aesthetic', 'eva': 'aesthetic', 'person-0': 'mine:reward_0'}
    printed = capsys.readouterr().out
    assert all(f'left out: {name}' in printed for name in ('dan', 'gil', 'ida', 'jan.tar.gz'))


def test_nothing_that_was_handed_in_is_executed(gallery, tmp_path, monkeypatch, capsys):
    "No module beside a run, no name in its settings, no path out of a packed one."
    run = make_run(tmp_path / 'all' / 'eve', reward='mine:my_reward')
    (run / 'mine.py').write_text('open("executed", "w")')
    bad = make_run(tmp_path / 'all' / 'mal')
    text = "reward: !!python/object/apply:os.system ['touch executed']\n"
    (bad / 'config.yaml').write_text(text, encoding='utf-8')
    with tarfile.open(tmp_path / 'all' / 'out.tar.gz', 'w:gz') as file:
        file.add(run / 'mine.py', 'mine.py')
        file.add(run / 'mine.py', '../../executed')
    script = make_run(tmp_path / 'all' / '<script>')
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))  # where packed runs are unpacked
    monkeypatch.chdir(run)
    shown = gallery(tmp_path / 'all')['shown']
    assert {run.name for run in shown} == {'eve', script.name}
    assert not list(tmp_path.rglob('executed'))


@pytest.mark.parametrize('name', ['', 'missing', 'empty', 'smoke'])
def test_a_mistyped_folder_is_refused(name, gallery, tmp_path):
    "Not replaced by something else to look at."
    (tmp_path / 'empty').mkdir()
    make_run(tmp_path / 'smoke' / 'a', num_epochs=2, samples_per_epoch=16)
    with pytest.raises(ValueError, match='holds no run to show'):
        gallery(tmp_path / name if name else '')


def test_a_relative_folder_counts_from_the_project(gallery, tmp_path, monkeypatch):
    make_room(tmp_path, 1)
    monkeypatch.chdir(ROOM)
    assert len(gallery(os.path.relpath(tmp_path, ROOT))['shown']) == 1


def test_the_command_packs_a_run_without_its_weights(tmp_path):
    "Under a megabyte, with all that the gallery reads."
    (command,) = re.findall(r'^tar (.*) -czf anna\.tar\.gz runs/tiny-aesthetic-002$', PAGE, re.M)
    run = make_run(tmp_path / 'runs' / 'x')
    for name in ('checkpoints/epoch-00001.pt', 'lora/weights.safetensors', 'pipeline/unet.bin'):
        path = run / name
        path.parent.mkdir()
        path.write_bytes(os.urandom(1_000_000))
    pack = ['tar', *command.split(), '-czf', 'anna.tar.gz', 'runs/x']
    subprocess.run(pack, cwd=tmp_path, check=True)
    assert (tmp_path / 'anna.tar.gz').stat().st_size < 1e6
    with tarfile.open(tmp_path / 'anna.tar.gz') as file:
        names = {Path(name).name for name in file.getnames()}
    needed = {'config.yaml', 'metrics.csv', 'evaluation.json', 'before_after.png'}
    assert needed <= names and not {'checkpoints', 'lora', 'pipeline'} & names


def test_the_reward_on_the_page_can_be_trained_on(tmp_path, monkeypatch):
    (text,) = re.findall(r'```python\n(.*?)```', PAGE, re.S)
    (tmp_path / 'mine.py').write_text(text, encoding='utf-8')
    monkeypatch.chdir(tmp_path)
    (name,) = re.findall(r'^ddpo_train --reward (\S+)$', PAGE, re.M)
    assert callable(own_reward(name))
    del sys.modules['mine']


def sections(path):
    "Heading -> minutes to read, from a heading to the next."
    minutes, heading = {}, ''
    for cell in cells(path, 'markdown', 'code'):
        text = source(cell)
        if cell['cell_type'] == 'code':
            lines = sum(bool(line.strip()) for line in text.splitlines())
            minutes[heading] = minutes.get(heading, 0) + lines / LINES
            continue
        for part in re.split(r'^(?=#+ )', text, flags=re.M):
            found = re.match(r'#+ (.*)', part)
            heading = found[1] if found else heading
            minutes[heading] = minutes.get(heading, 0) + len(part.split()) / WORDS
    return minutes


@pytest.mark.parametrize('row', PLAN, ids=lambda row: row[0])
def test_a_row_of_the_plan_fits_into_its_minutes(row):
    "What it shows exists, and leaves a fifth of the time; its minutes are right within one."
    begin, end = map(int, row[0].split(' to '))
    shown = 0
    _, *parts = LINK.split(row[2])
    for link, rest in zip(parts[::2], parts[1::2]):
        counted = sections(ROOM / link)
        for heading, said in re.findall(r'"([^"]+)" \((\d+)\)', rest):
            assert abs(counted[heading] - int(said)) <= 1, (heading, counted[heading])
            shown += counted[heading]
    assert shown <= 0.8 * (end - begin)
    exercises = re.findall(r'exercises? ([\d and]+) of \[\d+\]\(([^)]+)\)', row[4])
    assert exercises or (begin, end) in {(0, 10), (10, 25), (90, 100), (160, 172)}
    for numbers, link in exercises:
        text = '\n'.join(source(cell) for cell in cells(ROOM / link, 'markdown'))
        for number in re.findall(r'\d', numbers):
            assert f'\n**{number}. ' in text, (link, number)


def test_the_plan_is_three_hours_without_a_gap():
    times = [tuple(map(int, row[0].split(' to '))) for row in PLAN]
    assert times[0][0] == 0 and times[-1][1] == 180
    assert all(before[1] == after[0] for before, after in zip(times, times[1:]))


@pytest.mark.parametrize('page', sorted(ROOM.glob('*.md')), ids=lambda page: page.stem)
def test_links_of_the_pages_lead_somewhere(page):
    text = page.read_text(encoding='utf-8')
    for link in re.findall(r'\]\(([^)]+)\)', text):
        assert (page.parent / link).exists(), link


def test_copies_without_solutions_are_made_once(tmp_path):
    "The second time the command stops: nothing nests, and no answers are overwritten."
    (command,) = re.findall(r'^(mkdir learners && cp .*?) && jupyter', PAGE, re.M)
    shutil.copytree(ROOM, tmp_path / 'nbs' / 'room')
    first = subprocess.run(command, shell=True, cwd=tmp_path)
    answer = tmp_path / 'learners' / 'room' / 'WORKSHOP.md'
    answer.write_text('an answer', encoding='utf-8')
    second = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True)
    assert first.returncode == 0 and second.returncode != 0
    assert [path.name for path in (tmp_path / 'learners').iterdir()] == ['room']
    assert answer.read_text(encoding='utf-8') == 'an answer'


@pytest.mark.parametrize('folder', ['.', 'nbs', 'nbs/more', 'tests', None])
def test_files_beside_lessons_are_found_from_anywhere(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT / folder if folder else tmp_path)
    name = 'results/tiny_seeds.csv'
    assert lesson_file(name).resolve() == ROOT / 'nbs' / name


def test_copies_of_lessons_take_the_files_beside_them(tmp_path, monkeypatch):
    "Where nbs, with its solutions, has been deleted."
    path = tmp_path / 'learners' / 'results' / 'tiny_seeds.csv'
    path.parent.mkdir(parents=True)
    path.write_text('')
    (tmp_path / 'learners' / 'more').mkdir()
    monkeypatch.chdir(tmp_path / 'learners' / 'more')
    assert lesson_file('results/tiny_seeds.csv') == path


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_lessons_name_no_file_by_the_folder_they_run_in(path):
    "They ask `lesson_file`, which finds it wherever they run."
    for cell in cells(path):
        found = re.search(r"""\((f?['"](\.\./|images/|results/|\.\.['"]))""", source(cell))
        assert not found or 'lesson_file' in source(cell), source(cell)


def test_one_picture_a_screen():
    "Each picture of the page for the projector has its title, and the style is stored."
    page = cells(ROOM / '01_pictures.ipynb', 'markdown', 'code')
    pictures = [i for i, cell in enumerate(page) if source(cell).startswith('stored(')]
    assert len(pictures) == 10
    assert all(page[i - 1]['cell_type'] == 'markdown' for i in pictures)
    (style,) = [c for c in page if 'scroll-snap-align: start' in source(c)]
    assert 'text/html' in style['outputs'][0]['data']


def test_the_package_is_typed_and_can_be_called():
    "The marker that type checkers look for, in what a wheel holds; `python -m ddpo_tutorial`."
    assert (ROOT / 'ddpo_tutorial' / 'py.typed').exists() and MODULES
    assert 'package_data = py.typed ' in (ROOT / 'settings.ini').read_text(encoding='utf-8')
    assert 'include ddpo_tutorial/py.typed' in (ROOT / 'MANIFEST.in').read_text(encoding='utf-8')
    command = [sys.executable, '-m', 'ddpo_tutorial', '--eta', '-1']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and 'eta' in done.stdout + done.stderr
