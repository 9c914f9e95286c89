"`predict` on several processes: the same files as one process writes, whatever dies"
import os, signal, subprocess, sys
from pathlib import Path

import pytest

from covid3d.inference import Segmenter
from covid3d.phantom import phantom
from covid3d.predict import find_scans, predict_scans
from covid3d.volume import save_volume

psutil = pytest.importorskip('psutil'); pytest.importorskip('distributed')
n,damaged = int(os.environ.get('COVID3D_WORKER_SCANS', 12)),(2,5,7)

@pytest.fixture(scope='module')
def night(tmp_path_factory):
    "Small scans, three of them damaged, and what one process makes of them"
    d = tmp_path_factory.mktemp('night')
    for i in range(n):
        p = d/'in'/f's{i:03}.nii.gz'; save_volume(phantom(i%9, (30,80,80), (9.,4.4,4.4)).ct, p)
        if i in damaged: p.write_bytes(p.read_bytes()[:5000])
    df = predict_scans(find_scans([d/'in']), Segmenter.load('covid3d', 'cpu'), d/'one', page=False)
    assert [*df.state].count('failed')==len(damaged)
    return d

def files(out): return {o.name:o.read_bytes() for o in Path(out).iterdir() if o.name!='scans.csv'}

def test_a_killed_worker_costs_nothing(night, tmp_path):
    "One of two workers is killed in the middle: all scans are there as one process writes them, the damaged ones are named."
    rows,killed = [],[]
    def kill(row):
        rows.append(row)
        if killed or len(rows)<n//3: return
        mine = [p for p in psutil.Process().children(recursive=True) if 'spawn_main' in ' '.join(p.cmdline())]
        killed.append(mine[0].pid); mine[0].kill()
    df = predict_scans(find_scans([night/'in']), Segmenter.load('covid3d', 'cpu'), tmp_path/'m', page=False, workers=2, each=kill)
    assert killed and len(df)==n and sorted(df.scan[df.state=='failed'])==[f's{i:03}' for i in damaged]
    assert files(tmp_path/'m')==files(night/'one') and not [o for o in (tmp_path/'m').iterdir() if o.name[0]=='.']

def test_a_killed_run_resumes(night, tmp_path):
    "The process that hands out the scans is killed: a second run keeps what is done, and ends as an undisturbed one, without a file left over."
    words = [sys.executable, '-m', 'covid3d', 'predict', str(night/'in'), '-o', str(tmp_path/'m'), '--device', 'cpu', '--no-page', '--workers', '2']
    p = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for line in p.stdout:
        if '→' in line or '->' in line: break
    os.kill(p.pid, signal.SIGKILL); p.wait()
    r = subprocess.run(words, capture_output=True, text=True)
    assert r.returncode==1 and 'already done' in r.stdout and f'{len(damaged)} of {n} scans failed' in r.stderr
    assert files(tmp_path/'m')==files(night/'one') and not [o for o in (tmp_path/'m').iterdir() if o.name[0]=='.']

def test_two_runs_in_one_folder(night, tmp_path, capfd):
    "A second run in a folder where one is at work is told so."
    from covid3d.files import locked
    with locked(tmp_path/'m'):
        r = subprocess.run([sys.executable, '-m', 'covid3d', 'predict', str(night/'in'), '-o', str(tmp_path/'m'), '--device', 'cpu', '--workers', '2'], capture_output=True, text=True)
    assert r.returncode==2 and 'another process is writing there' in r.stderr

def test_slurm(night, tmp_path):
    "`--scheduler slurm` submits jobs, which segment; a stand-in for sbatch copies the script, as Slurm does, and runs it on this machine."
    pytest.importorskip('dask_jobqueue'); bin = tmp_path/'bin'; bin.mkdir()
    (bin/'sbatch').write_text(f'#!/bin/sh\ncp "$1" {tmp_path}/job.$$\nsetsid bash {tmp_path}/job.$$ >>{tmp_path}/jobs.log 2>&1 &\necho $! >>{tmp_path}/pids\necho Submitted batch job $!\n')
    (bin/'scancel').write_text('#!/bin/sh\nkill -- -$1\n')
    for o in bin.iterdir(): o.chmod(0o755)
    env = os.environ|dict(PATH=f'{bin}:{os.environ["PATH"]}', DASK_JOBQUEUE__SLURM__CORES='1', DASK_JOBQUEUE__SLURM__MEMORY='4GB', DASK_JOBQUEUE__SLURM__PYTHON=sys.executable)
    words = [sys.executable, '-m', 'covid3d', 'predict', str(night/'in'), '-o', str(tmp_path/'m'), '--device', 'cpu', '--no-page', '--scheduler', 'slurm', '--workers', '2']
    r = subprocess.run(words, capture_output=True, text=True, env=env, timeout=600, cwd=tmp_path)
    assert r.returncode==1 and f'{len(damaged)} of {n} scans failed' in r.stderr, r.stderr+(tmp_path/'jobs.log').read_text()[-2000:]
    assert len((tmp_path/'pids').read_text().split())==2 and files(tmp_path/'m')==files(night/'one')
    alone = subprocess.run(words, capture_output=True, text=True, env=os.environ|dict(DASK_JOBQUEUE__SLURM__CORES=''), cwd=tmp_path)
    assert alone.returncode==2 and 'slurm is not set up' in alone.stderr and alone.stderr.count('\n')<3
