"A pretraining: patients, then a training on them; cut off in either, refused where it must be, and good for what it is made for"
import json, os, subprocess, sys
from pathlib import Path

import pandas as pd, pytest

import covid3d.phantom
from covid3d.cli import main
from covid3d.files import manifest
from covid3d.inference import Segmenter
from covid3d.pretrain import pretrain
from covid3d.transforms import CTSpec
from covid3d.volume import CTError
from coarse import cached, small as small_phantom, write_coarse

spec = CTSpec(spacing=(9,7,7), patch=(16,32,32))
tiny = dict(width=4, spacing=spec.spacing, patch=spec.patch, epochs=1, device='cpu')
words = ['--patients','3','--width','4','--spacing','9,7,7','--patch','16,32,32','--epochs','1','--device','cpu']

@pytest.fixture(autouse=True)
def small_phantoms(monkeypatch): monkeypatch.setattr(covid3d.phantom, 'phantom', small_phantom)

def content(folder): return {p.relative_to(folder).as_posix():p.read_bytes() for p in sorted(Path(folder).rglob('*')) if p.is_file()}

def refused(capfd, argv, *said):
    capfd.readouterr()
    assert main([str(o) for o in argv])==2
    err = capfd.readouterr().err
    assert err.count('\n')==1 and all(o in err for o in said), err

def test_the_result_segments_and_starts_a_training(tmp_path, capfd):
    "The commands, one after the other: pretrain, predict with its network, and train from it"
    out,table = tmp_path/'pre',write_coarse(tmp_path/'data', n=4, seed=1)
    assert main(['pretrain','--out',str(out),*words])==0
    assert f'covid3d train cases.csv --init {out}/covid3d.safetensors' in capfd.readouterr().out
    ct = cached(2).ct
    seg = Segmenter.load(out/'covid3d.safetensors')(ct); masks = seg.masks
    assert seg.distance>0
    assert [*masks]==['lesion','right_lung','left_lung'] and all(m.shape==ct.shape for m in masks.values())
    assert pd.read_csv(out/'patients'/'cases.csv')['split'].tolist()==['train','valid','test'] and len(pd.read_csv(out/'history.csv'))==1
    grid = words[4:8]
    assert main(['train',str(table),'--out',str(tmp_path/'run'),'--init',str(out/'covid3d.safetensors'),'--epochs','1','--patches','2','--examples','0','--device','cpu',*grid])==0
    net = [json.loads((o/'recipe.json').read_text())['net'] for o in (out, tmp_path/'run')]
    assert net[0]['width']==4 and (tmp_path/'run'/'model.safetensors').is_file()

def test_what_is_not_ours_stays(tmp_path, capfd):
    "A table, or patients, that covid3d did not write are refused, before anything is made"
    for name in ('history.csv','patients/cases.csv','patients/ct/phantom_001.nii.gz'):
        out = tmp_path/name.replace('/','-'); (out/name).parent.mkdir(parents=True); (out/name).write_bytes(b'mine'); before = content(out)
        for more in ([], ['--overwrite']):
            refused(capfd, ['pretrain','--out',out,*words,*more], 'was not written by covid3d')
            assert content(out)==before

def test_another_pretraining_is_not_resumed(tmp_path, capfd):
    "Options that contradict those of the run in the folder: refused, and the run stays as it is"
    argv = ['pretrain','--out',tmp_path,*words]
    assert main([str(o) for o in argv])==0
    before = content(tmp_path)
    refused(capfd, argv, 'exists already', '--resume')
    refused(capfd, [*argv,'--resume','--overwrite'], 'contradicts')
    refused(capfd, ['pretrain','--out',tmp_path,'--patients','4',*words[2:],'--resume'], 'overwrite')
    refused(capfd, [*argv,'--seed','1','--resume'], 'overwrite')
    refused(capfd, [*argv,'--lr','.1','--resume'], 'lr')
    assert content(tmp_path)==before

def test_one_process_alone(tmp_path, monkeypatch):
    for k,v in dict(RANK='0', WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT='29500').items(): monkeypatch.setenv(k, v)
    with pytest.raises(CTError, match='pretraining: is work for one process, and 2 were started'): pretrain(tmp_path/'a', 3, **tiny)
    assert not (tmp_path/'a').exists()

# Killed

worker = """
import os, signal, sys
import torch, covid3d.checkpoint, covid3d.phantom
from covid3d.pretrain import pretrain
from covid3d.volume import host_name
made,save,write,moment = covid3d.phantom.phantom,covid3d.phantom.save_volume,covid3d.checkpoint.write_checkpoint,''
covid3d.phantom.phantom = lambda seed, *_: made(seed, (32,96,96), (9,3.7,3.7))
def die(folder):
    (folder/f'.covid3d-{host_name}-{2**22+1}-0123abcd.tmp').write_text('half of a file')
    os.kill(os.getpid(), signal.SIGKILL)
def saving(v, path):
    if moment==f'{path.parent.name}/{path.name}': die(path.parent)
    save(v, path)
def writing(path, state, tensors):
    if moment!=f'before epoch {state["epoch"]}': write(path, state, tensors)
    if moment.endswith(f'epoch {state["epoch"]}'): die(path.parent)
covid3d.phantom.save_volume,covid3d.checkpoint.write_checkpoint = saving,writing
print('ready', flush=True)
for line in sys.stdin:
    out,moment = line.rstrip().split('|'); pid = os.fork()
    if not pid:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1); torch.set_num_threads(1)
        pretrain(out, 3, width=4, spacing=(9,7,7), patch=(16,32,32), epochs=2, score_every=1, device='cpu', workers=0, resume=True)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""

@pytest.mark.fault('X5')
@pytest.mark.promise('lost')
def test_killed_anywhere_it_ends_with_the_same_weights(tmp_path):
    "SIGKILL while patients are written, before and after a checkpoint of the training on them: resumed, the pretraining ends as one without a break, and makes no patient twice"
    with subprocess.Popen([sys.executable,'-W','ignore','-c',worker], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ|dict(OMP_NUM_THREADS='1')) as p:
        assert p.stdout.readline()=='ready\n'
        def run(out, moment=''):
            p.stdin.write(f'{out}|{moment}\n'); p.stdin.flush()
            return int(p.stdout.readline())
        whole,cut = tmp_path/'whole',tmp_path/'cut'
        assert run(whole)==0
        assert run(cut, 'left_lung_mask/phantom_001.nii.gz')==-9 and not (cut/'patients'/'cases.csv').exists()
        first = (cut/'patients'/'ct'/'phantom_000.nii.gz').stat().st_mtime_ns
        assert run(cut, 'before epoch 1')==-9 and (cut/'patients'/'cases.csv').exists()
        assert run(cut, 'after epoch 1')==-9 and (cut/'checkpoint.safetensors').exists()
        assert run(cut)==0 and run(cut)==0  # and once more, when nothing is left to do
        p.stdin.close()
    assert (cut/'patients'/'ct'/'phantom_000.nii.gz').stat().st_mtime_ns==first
    a,b = (content(o) for o in (whole,cut))
    assert a.keys()==b.keys() and not [k for k in b if k.split('/')[-1][0]=='.']
    same = [k for k in a if k.startswith('patients/') and 'cases_prepared' not in k or k in ('model.safetensors','recipe.json',manifest)]
    assert len(same)>20 and all(a[k]==b[k] for k in same)
    x,y = (pd.read_csv(o/'history.csv').drop(columns='time') for o in (whole,cut))
    assert x.equals(y) and len(x)==2 and x.train_loss.is_unique
