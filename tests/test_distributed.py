"Two processes against one: real ones, started by torchrun, with gloo on the CPU"
import csv, json, os, re, signal, subprocess, sys, time
from pathlib import Path

import pytest, torch
from safetensors.torch import load_file, save_file

from covid3d.checkpoint import read_checkpoint
from covid3d.cli import main
from covid3d.learner import CTDataLoaders, CTSpec, set_seed
from coarse import write_coarse
from distributed_train import run

env = os.environ|dict(OMP_NUM_THREADS='1')
torchrun = [sys.executable,'-m','torch.distributed.run','--standalone','--nproc-per-node','2']
script = Path(__file__).with_name('distributed_train.py')

@pytest.fixture(scope='module')
def table(tmp_path_factory): return write_coarse(tmp_path_factory.mktemp('data'), n=5, seed=10)  # large lesions: without any, gradients are all but zero, and Adam makes noise of them

@pytest.fixture(scope='module')
def patches(table, tmp_path_factory):
    "A folder with patches cut and augmented beforehand: 11 to train and 3 to validate, so neither divides evenly"
    set_seed(0)
    dls = CTDataLoaders.from_table(table, CTSpec(spacing=(9,7,7), patch=(16,32,32)), bs=1, patches=5)
    x,y = zip(*[b for b,_ in zip(dls.train, range(14))])
    folder = tmp_path_factory.mktemp('patches')
    save_file(dict(x=torch.cat(x).as_subclass(torch.Tensor).contiguous(), y=torch.cat(y).as_subclass(torch.Tensor).contiguous()), folder/'patches.safetensors')
    return folder

def test_two_processes_equal_one(patches):
    "Two with batches of 2 against one with batches of 4: weights to 1e-5, losses, and the Dice pooled over unequal validation batches"
    with subprocess.Popen([*torchrun,script,patches,'2'], env=env) as p: run(patches, 4)
    assert p.returncode==0
    (one,r0,r1),(v,v0,_) = ([f(patches/f'{o}.{kind}') for o in ('batch4-rank0','batch2-rank0','batch2-rank1')] for f,kind in ((load_file,'safetensors'),(lambda p: json.loads(p.read_text()),'json')))
    assert all(torch.equal(r0[k], r1[k]) for k in r0)
    far = max(float((r0[k].float()-one[k].float()).abs().max()) for k in one)
    print(f'largest difference of a weight {far:.1e}, largest change by the training {v["moved"]:.2f}')
    assert far<1e-5
    torch.testing.assert_close(torch.tensor(v0['values']), torch.tensor(v['values']), atol=1e-5, rtol=1e-5, equal_nan=True)
    assert v['moved']>.01

def small(table, out, *more):
    return ['train',str(table),'--init','random','--width','4','--spacing','9,7,7','--patch','16,32,32','--patches','3','--epochs','3','--lr','1e-2','--bs','2','--score-every','1','--device','cpu','--out',str(out),*more]

def test_the_command_killed_and_resumed(table, tmp_path, capfd):
    "torchrun with `covid3d train`: one process dies, none hangs; resumed, the training ends; only the first process writes and prints"
    cmd,run = [*torchrun,'-m','covid3d.cli'],tmp_path/'run'
    with subprocess.Popen([*cmd,*small(table, run)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as p:
        while 'epoch 1 ' not in (line := p.stdout.readline()): assert line, p.stderr.read()
        os.kill(ranks(p.pid)[1], signal.SIGKILL)
        start = time.monotonic(); p.wait(30)
    assert p.returncode and time.monotonic()-start<20 and read_checkpoint(run/'checkpoint.safetensors')[0]['epoch']>=1
    assert main(small(table, run, '--resume'))==2  # one process cannot go on for two: the others' random numbers would be lost
    assert 'processes 2 then, 1 now' in capfd.readouterr().err
    res = subprocess.run([*cmd,*small(table, run, '--resume')], env=env, capture_output=True, text=True)
    assert res.returncode==0, res.stderr
    rows = list(csv.DictReader((run/'history.csv').open()))
    assert [r['epoch'] for r in rows]==['0','1','2'] and all(0<=float(r['scan_dice'])<=1 for r in rows)
    assert res.stdout.count('wrote ')==1 and res.stdout.count('epoch 2 ')==1 and 'are done' in res.stdout
    assert {'checkpoint.safetensors','history.csv','model.safetensors'}<={o.name for o in run.iterdir()} and not list(run.glob('.*'))

def test_from_the_weights_that_come_with_the_library(table, tmp_path):
    "Their memory layout has strides that PyTorch does not broadcast"
    res = subprocess.run([*torchrun,'-m','covid3d.cli','train',str(table),'--epochs','1','--patches','2','--bs','1','--device','cpu','--out',str(tmp_path/'run')], env=env, capture_output=True, text=True)
    assert res.returncode==0 and 'wrote ' in res.stdout, res.stderr

def ranks(pid):
    "Process numbers of the children of torchrun, in order of rank"
    kids = [int(o) for o in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]
    def rank(k): return int(re.search(rb'\0RANK=(\d+)', Path(f'/proc/{k}/environ').read_bytes())[1])
    return sorted(kids, key=rank)
