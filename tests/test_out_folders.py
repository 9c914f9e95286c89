"Folders that commands write to: what covid3d did not write is never touched, one process works at a time, and a refusal comes before the work"
import json, os, resource, shutil, signal, subprocess, sys
from contextlib import redirect_stderr
from pathlib import Path

import pytest
from fastai.callback.core import Callback

import covid3d.learner
from covid3d.cli import main
from covid3d.files import Outputs, manifest
from covid3d.learner import CTSpec, train
from covid3d.volume import host_name
from coarse import small as small_phantom, write_coarse

spec = CTSpec(spacing=(9,7,7), patch=(16,32,32))
small = ['--spacing','9,7,7','--patch','16,32,32','--device','cpu']
tiny = dict(init='random', width=4, epochs=1, patches=1, examples=1, device='cpu')

@pytest.fixture(scope='module')
def table(tmp_path_factory): return write_coarse(tmp_path_factory.mktemp('data'), n=4, seed=1)

@pytest.fixture(autouse=True)
def small_phantoms(monkeypatch):
    "The commands make small phantoms, whatever is asked for"
    monkeypatch.setattr('covid3d.phantom.phantom', small_phantom)

def commands(table, out):
    "The commands of training and of phantoms, each as short as it can be, and a name that it writes"
    run = ['train',table,'--out',out,'--init','random','--width','4','--epochs','1','--patches','2',*small]
    pre = ['pretrain','--out',out,'--patients','3','--width','4','--epochs','1',*small]
    return dict(train=(run, 'history.csv'), picture=(run, 'examples/epoch_000.png'), weights=(run, 'model.safetensors'), checkpoint=(run, 'checkpoint.safetensors'),
        resume=([*run,'--resume'], 'checkpoint.safetensors'), folds=([*run,'--folds','2'], 'fold_1/history.csv'), scores=([*run,'--folds','2'], 'fold_0/scores.csv'),
        report=([*run,'--folds','2'], 'report/index.html'), study=([*run,'--folds','2'], 'folds.json'), fold=([*run,'--folds','2','--fold','1'], 'folds.json'),
        pretrain=(pre, 'model.safetensors'), patients=(pre, 'patients/cases.csv'),
        phantom=(['phantom','-o',out,'--n','1'], 'cases.csv'), scan=(['phantom','-o',out,'--n','1'], 'ct/phantom_000.nii.gz'),
        mosmed=(['phantom','-o',out,'--n','1','--layout','mosmed'], 'studies/CT-1/study_0255.nii.gz'),
        ricord=(['phantom','-o',out,'--n','1','--layout','ricord'], 'MIDRC-RICORD-1a_annotations_labelgroup_all_2020-Dec-8.json'),
        demo=(['demo','--out',out,'--n','3'], 'demo.png'))

names = list(commands(Path('t'), 'o'))

def call(argv): return main([str(o) for o in argv])

def told(capfd, argv, *words, status=2):
    "The command ends with `status` and one line on stderr that holds `words`"
    capfd.readouterr()
    got = call(argv)
    err = capfd.readouterr().err
    assert got==status and err.count('\n')==1 and 'Traceback' not in err and all(str(w) in err for w in words), err

def content(folder): return {p.relative_to(folder).as_posix():p.read_bytes() for p in sorted(Path(folder).rglob('*')) if p.is_file()}

@pytest.mark.fault('X1')
@pytest.mark.promise('lost')
@pytest.mark.parametrize('name', names)
def test_what_is_not_ours_is_never_replaced(table, tmp_path, capfd, name):
    "A file that covid3d did not write is never replaced or removed, with --overwrite neither: the command is refused before any work"
    argv,file = commands(table, tmp_path/'out')[name]
    (tmp_path/'out'/file).parent.mkdir(parents=True); (tmp_path/'out'/file).write_bytes(b'years of work'); (tmp_path/'out'/'thesis.tex').write_bytes(b'mine')
    before = content(tmp_path)
    for more in ([], *[['--overwrite']]*(name not in ('resume',))):
        told(capfd, [*argv,*more], 'exists already' if name=='demo' else 'was not written by covid3d', tmp_path/'out')
        assert content(tmp_path)==before

linked = dict(train=('examples',), pretrain=('patients','examples'), folds=('fold_0','fold_1','report'), phantom=('ct','infection_mask'), mosmed=('studies','masks'),
              ricord=('MIDRC-RICORD-1A',), demo=('data','run','scores'))

@pytest.mark.fault('X1')
@pytest.mark.promise('executed')
@pytest.mark.parametrize('name,folder', [(k, o) for k,v in linked.items() for o in v])
@pytest.mark.parametrize('missing', [False,True])
def test_no_link_leads_out_of_the_folder(table, tmp_path, capfd, name, folder, missing):
    "A subfolder of --out that is a link is refused before any work: nothing is written, replaced or removed behind it"
    argv,file = commands(table, tmp_path/'out')[name]
    victim,listed = tmp_path/'victim',['history.csv','examples/epoch_000.png','folds.json','cases.csv','demo.png','ct/phantom_000.nii.gz']
    (tmp_path/'out').mkdir()
    (tmp_path/'out'/manifest).write_text(json.dumps(dict(files=dict.fromkeys(listed, {'mosmed':'phantom','ricord':'phantom','pretrain':'train'}.get(name, name)))))
    if not missing:
        victim.mkdir(); draft = victim/f'.covid3d-{host_name}-{2**22+1}-0123abcd.tmp'; draft.mkdir(); (draft/'thesis.tex').touch()
        for k in ('history.csv','epoch_000.png','phantom_000.nii.gz'): (victim/k).write_bytes(b'mine')
    (tmp_path/'out'/folder).symlink_to(victim)
    before = content(tmp_path/'victim')
    for more in ([], ['--overwrite'])[name=='demo':]: told(capfd, [*argv,*more], f'{tmp_path}/out/{folder}: is a link', 'Remove the link')
    assert content(tmp_path/'victim')==before and victim.exists()!=missing

@pytest.mark.promise('silent')
@pytest.mark.parametrize('env', [dict(RANK='1', WORLD_SIZE='2'), dict(WORLD_SIZE='y'), dict(RANK='3', WORLD_SIZE='many')])
def test_what_only_looks_like_torchrun(table, tmp_path, monkeypatch, env):
    "A process with half of torchrun's environment is alone: it trains, and says and writes what a lone process does"
    for k,v in env.items(): monkeypatch.setenv(k, v)
    assert call(commands(table, tmp_path/'out')['folds'][0])==0
    assert all((tmp_path/'out'/o).exists() for o in ('fold_0/history.csv','fold_1/model.safetensors','report/index.html'))

def test_out_may_be_a_link(table, tmp_path):
    "--out itself may be a link; drafts of processes that are gone are swept behind it"
    (tmp_path/'disk').mkdir(); (tmp_path/'out').symlink_to(tmp_path/'disk')
    draft = tmp_path/'disk'/f'.covid3d-{host_name}-{2**22+1}-0123abcd.tmp'; draft.touch()
    assert call(['phantom','-o',tmp_path/'out','--n','1'])==0
    assert (tmp_path/'disk'/'cases.csv').exists() and not draft.exists()

def test_a_linked_prepared_case_is_read_and_not_written(table, tmp_path):
    "A link to a prepared case elsewhere is opened as it is"
    work = tmp_path/'work'
    shutil.copytree(table.parent, work)
    assert call(['prepare',work/'cases.csv','--out',tmp_path/'a',*small[:4]])==0
    case = next(p for p in (tmp_path/'a').iterdir() if p.is_dir())
    shutil.move(case, tmp_path/'there'); case.symlink_to(tmp_path/'there'); before = content(tmp_path/'there')
    for p in (work/'ct').iterdir(): os.utime(p, (1,1))  # which the case would note
    call(['prepare',work/'cases.csv','--out',tmp_path/'a',*small[:4]])
    assert content(tmp_path/'there')==before and case.is_symlink()

@pytest.mark.parametrize('argv', [['phantom','-o',''], ['demo','--out',''], ['train',os.devnull,'--out','','--init','random'], ['predict','.','--out','']])
def test_an_empty_name_is_no_folder(argv, tmp_path, capfd, monkeypatch):
    "An empty --out, as an unset variable of a script gives it, is refused, not taken for the current folder"
    monkeypatch.chdir(tmp_path)
    told(capfd, argv, 'no folder to write to'); assert content(tmp_path)=={}

@pytest.mark.fault('X1')
@pytest.mark.promise('lost')
def test_a_command_replaces_only_its_own_files(table, tmp_path, capfd):
    "What another command of covid3d wrote is not replaced, with --overwrite neither"
    for first,second,file in (('phantom','prepare','cases.csv'), ('prepare','phantom','cases.csv')):
        out = tmp_path/first
        argv = {**{k:v for k,(v,_) in commands(table, out).items()}, 'prepare':['prepare',table,'--out',out,*small[:4]]}
        assert call(argv[first])==0
        before = content(out)
        for more in ([], ['--overwrite'])[:2-(second=='prepare')]: told(capfd, [*argv[second],*more], f'{out}/{file}', f'was written by covid3d {first}')
        assert content(out)==before

@pytest.mark.promise('lost')
def test_train_in_the_folder_of_your_work(table, tmp_path, capfd, monkeypatch):
    "train --out . beside your own examples/, notes/, drafts and notes, and again with --overwrite: all of them stay"
    monkeypatch.chdir(tmp_path)
    for o in ('examples/holiday.png','notes/notes.txt','.draft.tmp','.covid3d-x.tmp','scores.csv','thesis.tex'):
        Path(o).parent.mkdir(exist_ok=True); Path(o).write_bytes(b'mine')
    before,argv = content('.'),commands(table, '.')['train'][0]
    for more in ([], ['--overwrite','--examples','0']):
        assert call([*argv,*more])==0
        now = content('.')
        assert all(now[k]==v for k,v in before.items()) and {'model.safetensors','history.csv',manifest}<={*now}
        assert ('examples/epoch_000.png' in now)==('0' not in more)
    told(capfd, argv, 'exists already', '--resume')
    Path('history.csv').unlink(); Path('model.safetensors').unlink(); Path(manifest).unlink(); Path('history.csv').write_bytes(b'mine')
    told(capfd, [*argv,'--overwrite'], 'was not written by covid3d')
    assert Path('history.csv').read_bytes()==b'mine'

@pytest.mark.promise('executed')
def test_a_list_from_a_stranger_removes_nothing_else(table, tmp_path):
    "A list of files that came with a folder removes nothing outside it, and nothing that a training does not write"
    out = tmp_path/'run'; (out/'sub').mkdir(parents=True)
    for o in ('../dear.txt','sub/dear.txt','notes.txt'): (out/o).write_bytes(b'mine')
    (out/manifest).write_text(json.dumps(dict(files=dict.fromkeys(['../dear.txt','sub/dear.txt','notes.txt','examples/../../dear.txt','/etc/passwd'], 'train'))))
    before = content(tmp_path)
    train(table, out, spec=spec, **tiny|dict(examples=0))
    now = content(tmp_path)
    assert all(now[k]==v for k,v in before.items() if not k.endswith(manifest))

def test_a_new_training_leaves_nothing_of_the_former(table, tmp_path):
    "Weights and pictures of another network would pass for those of this one"
    out,stop = tmp_path/'run',[]
    class Cut(Callback):
        def after_step(self):
            if stop: raise KeyboardInterrupt
    train(table, out, spec=spec, plot=True, cbs=[Cut()], **tiny); stop.append(1)
    assert (out/'history.png').exists() and (out/'examples'/'epoch_000.png').exists()
    with pytest.raises(KeyboardInterrupt): train(table, out, spec=spec, cbs=[Cut()], **tiny)
    assert sorted(o.name for o in out.iterdir())==['checkpoint.safetensors',manifest,'recipe.json']

def test_a_smaller_cross_validation_leaves_nothing_of_the_former(table, tmp_path, capfd):
    "Folds, report and settings of the former one go, with --overwrite alone, and your files between them stay"
    out = tmp_path/'cv'; argv = commands(table, out)['folds'][0]
    for i in (0,1,7):
        (out/f'fold_{i}').mkdir(parents=True)
        for o in ('model.safetensors','scores.csv'): (out/f'fold_{i}'/o).write_bytes(b'former'); Outputs(out/f'fold_{i}', 'folds' if o=='scores.csv' else 'train', o).add(o)
    (out/'fold_7'/'notes.txt').write_bytes(b'mine'); (out/'fold_notes').mkdir()
    told(capfd, argv, 'exists already'); assert (out/'fold_7'/'scores.csv').exists()
    assert call([*argv,'--overwrite','--examples','0'])==0
    assert [o.name for o in (out/'fold_7').iterdir()]==['notes.txt'] and (out/'fold_notes').is_dir() and (out/'report'/'index.html').exists()
    assert b'former' not in {p.read_bytes() for p in out.rglob('*') if p.is_file()} and not list(out.rglob('.*'))

holder = 'import sys\nfrom covid3d.files import locked\nwith locked(sys.argv[1], folder=True):\n print("locked", flush=True)\n sys.stdin.read()'

@pytest.fixture(scope='module')
def hold():
    "Another process that locks a folder"
    held = []
    def lock(folder):
        p = subprocess.Popen([sys.executable,'-c',holder,str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert p.stdout.readline()=='locked\n'; held.append(p)
    yield lock
    for p in held: p.stdin.close(); p.wait()

@pytest.mark.fault('X12')
@pytest.mark.promise('lost')
@pytest.mark.parametrize('name', ['train','resume','folds','pretrain','phantom','mosmed','demo'])
def test_the_second_is_told(table, tmp_path, capfd, hold, name):
    "While a process works in a folder, every other command that would write there is refused, with --resume and --overwrite too"
    hold(tmp_path/'run.v2')
    before = content(tmp_path)
    argv,_ = commands(table, tmp_path/'run.v2')[name]
    for more in ([], *[['--overwrite']]*(name not in ('resume',))): told(capfd, [*argv,*more], 'another process is writing there', tmp_path/'run.v2')
    assert content(tmp_path)==before

def test_one_fold_beside_another(table, tmp_path, capfd, hold):
    "Two folds can be trained at once, the same fold cannot, nor all folds beside one"
    argv = commands(table, tmp_path/'cv')['folds'][0]
    hold(tmp_path/'cv'/'fold_0')
    told(capfd, [*argv,'--fold','0'], 'fold_0', 'another process is writing there')
    told(capfd, argv, 'fold_0', 'another process is writing there')
    assert call([*argv,'--fold','1'])==0

@pytest.mark.promise('lost')
def test_train_holds_its_lock_to_the_end(table, tmp_path):
    "A training started from Python keeps others out of its folder while it runs, and lets them in afterwards"
    out,said = tmp_path/'run',[]
    def ask(): return subprocess.run([sys.executable,'-c',holder,str(out)], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    class Ask(Callback):
        def after_fit(self): said.append(ask().stderr)
    train(table, out, spec=spec, cbs=[Ask()], **tiny)
    assert 'another process is writing there' in said[0] and ask().returncode==0 and not list(out.rglob('.*'))

@pytest.mark.fault('X13')
@pytest.mark.promise('lost')
def test_X13_sigterm_ends_with_a_checkpoint_and_a_free_folder(table, tmp_path, capfd, monkeypatch):
    "SIGTERM, a cluster's way to end a job: status 143, nothing half-written, no lock left; --resume ends with the weights of a training that was not stopped"
    class Told(covid3d.learner._Awaited):
        n = 0
        def after_batch(self):
            super().after_batch(); Told.n += self.training
            if Told.n==9: signal.raise_signal(signal.SIGTERM)
    argv = ['train',table,'--init','random','--width','4','--epochs','3','--patches','4','--score-every','1',*small]
    assert call([*argv,'--out',tmp_path/'whole'])==0
    with monkeypatch.context() as m:
        m.setattr(covid3d.learner, '_Awaited', Told)
        try: status = call([*argv,'--out',tmp_path/'run'])
        except SystemExit as e: status = e.code
    assert status==143 and Told.n<12 and not list((tmp_path/'run').rglob('.*'))
    told(capfd, [*argv,'--out',tmp_path/'run'], 'exists already', '--resume')
    assert call([*argv,'--out',tmp_path/'run','--resume'])==0
    assert (tmp_path/'run'/'model.safetensors').read_bytes()==(tmp_path/'whole'/'model.safetensors').read_bytes()

@pytest.mark.skipif(not Path('/proc/self').is_dir(), reason='needs a file system that nobody can write to')
@pytest.mark.fault('X7')
@pytest.mark.parametrize('name', ['train','folds','pretrain','phantom','mosmed','demo'])
def test_a_place_that_cannot_be_written(table, tmp_path, capfd, name):
    "Said at the start, in one line"
    (tmp_path/'file').write_bytes(b'mine')
    for out in ('/proc/foo','/proc/foo/run',tmp_path/'file',tmp_path/'file'/'run'): told(capfd, commands(table, out)[name][0], out if 'run' not in str(out) else Path(out).parent)
    assert content(tmp_path)=={'file':b'mine'}

@pytest.mark.fault('X6')
def test_a_full_disk_leaves_no_draft(tmp_path):
    "The first scan does not fit: one line, and nothing half-written"
    pid = os.fork()
    if not pid:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000,)*2)
        with open(tmp_path/'err', 'w') as f, redirect_stderr(f): status = call(['phantom','-o',tmp_path/'p','--n','1'])
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])==2
    err = (tmp_path/'err').read_text()
    assert err.count('\n')==1 and 'cannot be written' in err
    assert [p.name for p in (tmp_path/'p').rglob('*') if p.is_file() and p.name!='phantoms.json']==[manifest]  # that note is whole, and an interrupted run is resumed by it
    assert call(['phantom','-o',tmp_path/'p','--n','1'])==0

@pytest.mark.fault('X4')
@pytest.mark.parametrize('more', [['--epochs','0'], ['--epochs','10000000'], ['--bs','-1'], ['--bs','0'], ['--bs','100000000'], ['--patches','1000000000000'], ['--seed','-1'],
    ['--seed','1'+'0'*20], ['--workers','-1'], ['--workers','100000'], ['--width','1000000'], ['--lr','nan'], ['--frozen-lr','-1'], ['--oversample-foreground','2'], ['--oversample-foreground','nan'],
    ['--ema','1'], ['--ema','nan'], ['--clip','-1'], ['--clip','nan'], ['--lr-ratio','inf'], ['--frozen-stages','9'], ['--frozen-epochs','-1'], ['--examples','-1'], ['--folds','1'],
    ['--folds','1000000000000'], ['--folds','2','--fold','2'], ['--keep','some'], ['--device','meta'], ['--device','tpu'], ['--score-every','0'], ['--loss','x'], ['--augment','x'], ['--up','x'], ['--norm','x']],
    ids=' '.join)
def test_numbers_that_no_training_can_use(table, tmp_path, capfd, more):
    "One line that names the option, before a folder is made"
    argv = [o for o in commands(table, tmp_path/'run')['train'][0]]
    if more[0] in argv: i = argv.index(more[0]); argv[i:i+2] = []
    told(capfd, [*argv,*more], more[-2] if '--fold' not in more else 'fold')
    assert list(tmp_path.iterdir())==[]

@pytest.mark.fault('X4')
@pytest.mark.parametrize('argv', [['pretrain','--out','OUT','--seed','-1'], ['pretrain','--out','OUT','--epochs','0'], ['pretrain','--out','OUT','--patients','100000000'], ['pretrain','--out','OUT','--patients','2'],
    ['phantom','-o','OUT','--n','0'], ['phantom','-o','OUT','--n','100000000'], ['phantom','-o','OUT','--seed','-1'], ['phantom','-o','OUT','--layout','x'], ['demo','--out','OUT','--n','2'], ['demo','--out','OUT','--seed','-1']], ids=lambda o: ' '.join(o[0:1]+o[-2:]))
def test_numbers_of_other_commands(table, tmp_path, capfd, argv):
    told(capfd, [dict(OUT=tmp_path/'out', TABLE=table).get(o, o) for o in argv], argv[-2].strip('-').removesuffix('s'))
    assert list(tmp_path.iterdir())==[]

@pytest.mark.promise('named')
def test_no_folder_is_named_in_what_training_writes(tmp_path, capfd):
    "Folders of real exports carry names of patients: none of them is in the history, the settings, the lists, or the headers of weights and checkpoints"
    table = write_coarse(tmp_path/'DOEMEIER^JOHANNES', n=4, seed=1)  # too long to occur in weights by chance
    assert call([*commands(table, tmp_path/'cv')['folds'][0],'--plot'])==0
    for k,raw in content(tmp_path/'cv').items(): assert b'DOEMEIER' not in raw and b'JOHANNES' not in raw, k
