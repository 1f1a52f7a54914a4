"""What happens inside the command's process, at chosen moments: see breaking.py.

These functions travel to the process. This module does not import PyTorch, which the command may
not have imported yet.
"""

import errno
import io
import os
import resource
import shutil
import signal
import sys
import time
from functools import partial
from importlib import import_module
from inspect import ismethod
from itertools import count


def at(where, calls, action):
    "Something to be done at some calls of a function, before it."
    return partial(plant, where, (calls,) if isinstance(calls, int) else calls, action)


def plant(where, calls, action):
    "Put a function around another one."
    module, _, path = where.partition(':')
    *parents, name = path.split('.')
    owner = import_module(module)
    for parent in parents:
        owner = getattr(owner, parent)
    original = getattr(owner, name)
    numbers = count(1)

    def planted(*args, **options):
        if next(numbers) in calls:
            action(*args)
        return original(*args, **options)

    setattr(owner, name, staticmethod(planted) if ismethod(original) else planted)


EVER = range(1, 10**9)


def send(*signals):
    "Signals to this process, a second apart: a launcher's echo is no second one."
    return partial(in_turn, signals)


def in_turn(signals, *args):
    for i, number in enumerate(signals):
        if i:
            time.sleep(1.2)
        os.kill(os.getpid(), number)


def fail(error):
    return partial(throw, error)


def throw(error, *args):
    raise error


def no_access(path, *args):
    "What a file of somebody else's does, for root too."
    if 'locked' in str(path):
        raise PermissionError(errno.EACCES, 'Permission denied', str(path))


LOCKED = (at('io:open', EVER, no_access), at('builtins:open', EVER, no_access))
FULL = OSError(errno.ENOSPC, 'No space left on device')
NO_LOCKS = OSError(errno.ENOLCK, 'No locks available')


def other_command(line, *args):
    "A second command, from start to end, while the first one waits."
    from ddpo_tutorial.command import main

    sys.stdout.flush()
    child = os.fork()
    if not child:
        code = main(line.split())
        print(f'the other one ended with {code}', flush=True)
        os._exit(code)
    os.waitpid(child, 0)


def another(line):
    return partial(other_command, line)


class CtrlC:
    "A finder of modules that finds none, and sends a signal when one is looked for."

    def __init__(self, module):
        self.module = module

    def find_spec(self, name, path=None, target=None):
        if name == self.module:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)


def stop_import(module):
    sys.meta_path.insert(0, CtrlC(module))


def current_folder():
    sys.path.insert(0, '')


def forget(name, *args):
    "A folder is gone."
    shutil.rmtree(name)


def go_away(*args):
    "The current folder is gone."
    os.mkdir('gone')
    os.chdir('gone')
    os.rmdir('../gone')


def limit_files(size, *args):
    "No file can be longer: what a quota or a full disk does."
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def close_streams(numbers, *args):
    "As a service manager that gives none."
    for number in numbers:
        os.close(number)
        setattr(sys, ('stdin', 'stdout', 'stderr')[number], None)


def reader_gone(*args):
    "A pipe to a program that has ended."
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 1)


def full_device():
    os.dup2(os.open('/dev/full', os.O_WRONLY), 1)


def strings():
    "As under redirect_stdout."
    sys.stdout = io.StringIO()


class OutStream(io.TextIOBase):
    "As a kernel's."

    def write(self, text):
        return len(text)

    def fileno(self):
        raise io.UnsupportedOperation('fileno')


def kernel():
    "As in a notebook."
    sys.stdout = OutStream()


def set_encoding(name):
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding=name)


def float64():
    import torch

    torch.set_default_dtype(torch.float64)


def set_clock(seconds):
    real = time.time
    time.time = lambda: real() + seconds


def limit_descriptors(number):
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, number))
