"The command line as a user meets it: the whole way on small phantoms, and what happens when something is wrong"
import csv, io, json, os, re, subprocess, sys
from pathlib import Path

import nibabel as nib, numpy as np, pytest
from safetensors.torch import save_file

import typer

from covid3d.cli import _one_line, _options, app, main
from covid3d.weights import NetSpec, load_model, save_model
from covid3d.volume import CTError
from covid3d.transforms import CTSpec
from coarse import write_coarse

spec = CTSpec(spacing=(9,5,5), patch=(16,48,48))
names = [*typer.main.get_command(app).commands]

@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "Five small phantoms in the folder layout"
    root = tmp_path_factory.mktemp('data')
    write_coarse(root, n=5, seed=0)
    return root

@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    "An untrained model, saved"
    path = tmp_path_factory.mktemp('weights')/'model.safetensors'
    net = NetSpec(width=4)
    save_model(net.build(spec.classes), path, spec, net)
    return path

@pytest.fixture
def ct(data): return data/'ct'/'phantom_000.nii.gz'

def refused(capfd, argv, *words, status=2):
    "The command ends with `status` and one line on stderr that holds `words`"
    assert main([str(o) for o in argv])==status
    err = capfd.readouterr().err
    assert err.count('\n')==1 and 'Traceback' not in err and all(str(w) in err for w in words), err

def test_whole_way(data, tmp_path, capfd):
    "table → train → evaluate → predict, as the README has it"
    table,run,scores,masks = tmp_path/'cases.csv',tmp_path/'run',tmp_path/'scores',tmp_path/'masks'
    assert main(['table',str(data),'--valid','phantom_003','--test','phantom_004','-o',str(table)])==0
    small = ['--init','random','--width','4','--spacing','9,5,5','--patch','16,48,48','--epochs','2','--patches','2','--device','cpu']
    assert main(['train',str(table),'--out',str(run),*small])==0
    assert sorted(o.name for o in run.iterdir())==['checkpoint.safetensors','covid3d.json','examples','history.csv','model.safetensors','recipe.json']
    history = list(csv.DictReader((run/'history.csv').open()))
    assert len(history)==2 and 0<=float(history[-1]['scan_dice'])<=1
    _,ct_spec,net = load_model(run/'model.safetensors')
    assert (ct_spec.spacing,net.width)==((9,5,5),4)
    w = ['--weights',str(run/'model.safetensors'),'--device','cpu']
    assert main(['evaluate',str(table),*w,'--out',str(scores)])==0
    row, = csv.DictReader((scores/'scores.csv').open())
    assert row['case']=='phantom_004' and 0<=float(row['dice'])<=1
    assert f'mean Dice {float(row["dice"]):.3f}' in capfd.readouterr().out and '<html' in (scores/'index.html').read_text()
    src = data/'ct'/'phantom_004.nii.gz'
    assert main(['predict',str(src),*w,'--out',str(masks)])==0
    out,src = nib.load(masks/'phantom_004_lesion.nii.gz'),nib.load(src)
    assert out.shape==src.shape and (out.affine==src.affine).all() and set(np.unique(out.dataobj))<={0,1}
    assert main(['predict',str(data/'ct'/'phantom_004.nii.gz'),*w,'--out',str(masks)])==0 and 'already done' in capfd.readouterr().out
    refused(capfd, ['predict',data/'ct'/'phantom_004.nii.gz',*w,'--out',masks,'--overlap','.25'], 'exists already', '--overwrite')
    refused(capfd, ['train',table,'--out',run,*small], 'exists already')

def test_folds(data, tmp_path, capfd):
    "Each scan but the test scan is scored once; the folds as one network; against one of them; a fold at a time"
    table,cv = tmp_path/'cases.csv',tmp_path/'cv'
    assert main(['table',str(data),'--test','phantom_004','-o',str(table)])==0
    small = ['--init','random','--width','4','--spacing','9,5,5','--patch','16,48,48','--epochs','1','--patches','2','--device','cpu','--folds','2']
    assert main(['train',str(table),'--out',str(cv),*small,'--fold','1'])==0
    assert 'folds still to train: 0' in capfd.readouterr().out and not (cv/'report').exists()
    refused(capfd, ['train',table,'--out',cv,*small,'--fold','1'], 'exists already', '--resume')
    assert main(['train',str(table),'--out',str(cv),*small,'--resume'])==0
    assert sorted(r['case'] for r in csv.DictReader((cv/'report'/'scores.csv').open()))==[f'phantom_{i:03d}' for i in range(4)]
    for name,w in dict(both=cv, first=cv/'fold_0'/'model.safetensors').items():
        assert main(['evaluate',str(table),'--weights',str(w),'--out',str(tmp_path/name),'--device','cpu',*(['--compare',str(tmp_path/'both')] if name=='first' else [])])==0
    assert 'against both: Dice' in capfd.readouterr().out and 'both' in (tmp_path/'first'/'index.html').read_text()
    refused(capfd, ['evaluate',table,'--split','train','--weights',cv,'--out',tmp_path/'x','--compare',tmp_path/'both'], 'phantom_')
    refused(capfd, ['evaluate',table,'--weights',tmp_path,'--out',tmp_path/'x'], 'not a file of weights nor a cross-validation')
    refused(capfd, ['train',table,'--out',tmp_path/'y',*small,'--fold','2'], 'fold', 'Give 0 to 1')
    refused(capfd, ['train',table,'--out',cv,*small[:-1],'3','--fold','2'], 'folds.json', 'k 2 then, 3 now')
    refused(capfd, ['train',table,'--out',cv,*small,'--fold','0','--lr','1e-2','--overwrite'], 'folds.json', 'lr')
    assert not (tmp_path/'x').exists() and not (tmp_path/'y').exists()

def test_reproduce_says_what_it_needs(tmp_path, capfd):
    refused(capfd, ['reproduce','--out',tmp_path/'out'], 'ricord')
    refused(capfd, ['reproduce','--out',tmp_path/'out','--mosmed',tmp_path/'nowhere','--config','x'], 'x: no such recipe', 'resize')
    assert not (tmp_path/'out').exists()

def test_augmentation_changes_what_is_learned(data, tmp_path):
    "Each choice of --augment trains, and to other weights"
    small = ['--init','random','--width','4','--spacing','9,5,5','--patch','16,48,48','--epochs','1','--patches','2','--device','cpu']
    for o in ('none','light','full'): assert main(['train',str(data/'cases.csv'),'--out',str(tmp_path/o),*small,'--augment',o])==0
    assert len({(tmp_path/o/'model.safetensors').read_bytes() for o in ('none','light','full')})==3

def test_memory_is_planned_and_said(data, tmp_path, capfd):
    "A budget that fits says what it chose, one that does not says what is needed"
    small = ['--init','random','--width','4','--spacing','9,5,5','--patch','16,48,48','--epochs','1','--patches','2','--device','cpu','--plot']
    assert main(['train',str(data/'cases.csv'),'--out',str(tmp_path/'a'),*small,'--memory','8GB'])==0
    assert '8 GB: 2 patches at a time, fp32, activations kept' in capfd.readouterr().out and (tmp_path/'a'/'history.png').stat().st_size>5000
    refused(capfd, ['train',data/'cases.csv','--out',tmp_path/'b',*small,'--memory','1MB'], 'memory=1MB', 'at the least')
    refused(capfd, ['train',data/'cases.csv','--out',tmp_path/'b',*small,'--memory','much'], 'much')
    assert not (tmp_path/'b'/'model.safetensors').exists()

def test_training_again_gives_the_same_weights(data, tmp_path):
    small = ['--init','random','--width','4','--spacing','9,5,5','--patch','16,48,48','--epochs','1','--patches','2','--device','cpu','--seed','3']
    for o in 'ab': assert main(['train',str(data/'cases.csv'),'--out',str(tmp_path/o),*small])==0
    a,b = ((tmp_path/o/'model.safetensors').read_bytes() for o in 'ab')
    assert a==b

@pytest.mark.parametrize('argv,words', [
    (['predict','nowhere.nii.gz'], ['nowhere.nii.gz','no such file or folder']),
    (['evaluate','nowhere.csv'], ['nowhere.csv','no such case table']),
    (['train','nowhere.csv'], ['nowhere.csv','no such case table']),
    (['table','nowhere'], ['nowhere','no such folder'])])
def test_wrong_path(capfd, tmp_path, weights, argv, words):
    more = dict(table=[], train=['--init','random']).get(argv[0], ['--weights',str(weights)])
    refused(capfd, [*argv,*more,'--out',tmp_path/('out.csv' if argv[0]=='table' else 'out')], *words)
    assert not list(tmp_path.iterdir())

def test_directory_of_nothing(capfd, tmp_path, weights):
    (tmp_path/'empty').mkdir()
    refused(capfd, ['predict',tmp_path/'empty','--weights',weights,'--out',tmp_path/'out'], tmp_path/'empty', 'no .nii.gz, .nrrd or .mha')
    refused(capfd, ['table',tmp_path/'empty','-o',tmp_path/'c.csv'], tmp_path/'empty', 'its layout is none that is known', 'write the table by hand (columns case, ct, lesion, split)')
    assert sorted(o.name for o in tmp_path.iterdir())==['empty']

def test_truncated_scan_costs_only_itself(capfd, tmp_path, weights, ct):
    (tmp_path/'cut.nii.gz').write_bytes(ct.read_bytes()[:-1000])
    assert main(['predict',str(tmp_path/'cut.nii.gz'),str(ct),'--weights',str(weights),'--out',str(tmp_path/'out'),'--device','cpu'])==1
    err = capfd.readouterr().err
    assert 'cut: the gzip stream is damaged' in err and '1 of 2 scans failed' in err and 'Traceback' not in err
    assert [o.name for o in (tmp_path/'out').glob('*.nii.gz')]==['phantom_000_lesion.nii.gz']

def bad_table(data, tmp_path, **change):
    "The case table with a change in its first line, all paths absolute"
    rows = list(csv.DictReader((data/'cases.csv').open()))
    for r in rows: r.update({k:str(data/r[k]) for k in ('ct','lesion','lung')})
    rows[0].update({k:str(v) for k,v in change.items()})
    with (tmp_path/'bad.csv').open('w') as f:
        w = csv.DictWriter(f, rows[0]); w.writeheader(); w.writerows(rows)
    return tmp_path/'bad.csv'

def test_mask_of_another_shape(capfd, data, tmp_path):
    m = nib.load(data/'infection_mask'/'phantom_000.nii.gz')
    nib.save(m.slicer[:-4], tmp_path/'short.nii.gz')
    table = bad_table(data, tmp_path, lesion=tmp_path/'short.nii.gz', split='train')
    refused(capfd, ['train',table,'--init','random','--width','4','--spacing','9,5,5','--patch','16,48,48','--out',tmp_path/'run','--device','cpu'],
            'short.nii.gz', 'its shape', 'Give the mask of this scan')
    assert not (tmp_path/'run').exists()

def test_bad_case_does_not_stop_evaluation(capfd, data, tmp_path, weights):
    (tmp_path/'cut.nii.gz').write_bytes((data/'ct'/'phantom_000.nii.gz').read_bytes()[:5000])
    table = bad_table(data, tmp_path, ct=tmp_path/'cut.nii.gz', split='test')
    assert main(['evaluate',str(table),'--weights',str(weights),'--out',str(tmp_path/'out'),'--device','cpu'])==1
    rows = list(csv.DictReader((tmp_path/'out'/'scores.csv').open()))
    assert 'gzip' in rows[0]['error'] and rows[0]['dice']=='' and all(r['dice'] for r in rows[1:])

def test_weights_of_another_encoder(capfd, tmp_path, ct):
    net,other = NetSpec('r3d_18', width=4),NetSpec('mc3_18', width=4)
    save_model(other.build(spec.classes), tmp_path/'other.safetensors', spec, net)
    refused(capfd, ['predict',ct,'--weights',tmp_path/'other.safetensors','--out',tmp_path/'out'], 'other.safetensors', 'weights of another network', 'layer')
    save_file({'stem.0.weight':__import__('torch').zeros(2)}, tmp_path/'bare.safetensors')
    refused(capfd, ['predict',ct,'--weights',tmp_path/'bare.safetensors','--out',tmp_path/'out'], 'bare.safetensors', 'no specification')
    (tmp_path/'learner.pkl').write_bytes(b'\x80\x04.')
    refused(capfd, ['predict',ct,'--weights',tmp_path/'learner.pkl','--out',tmp_path/'out'], 'learner.pkl', 'never opened')
    assert not (tmp_path/'out').exists()

def test_grey_scan_needs_its_window(capfd, tmp_path, weights, ct):
    img = nib.load(ct)
    grey = ((np.clip(img.get_fdata(), -1000, 20)+1000)/4).astype(np.uint8)
    nib.save(nib.Nifti1Image(grey, img.affine), tmp_path/'grey.nii.gz')
    argv = ['predict',str(tmp_path/'grey.nii.gz'),'--weights',str(weights),'--out',str(tmp_path/'out'),'--device','cpu']
    assert main(argv)==1 and '--already-windowed' in capfd.readouterr().err
    assert main([*argv,'--already-windowed','-1000:20'])==0
    refused(capfd, [*argv,'--overwrite','--already-windowed','20:-1000'], 'low:high')

def test_options_out_of_range(capfd, data, tmp_path, weights, ct):
    table = data/'cases.csv'
    for more,word in [(['--epochs','0'],'epochs'), (['--spacing','3,2'],'spacing'), (['--window','400,-1000'],'window'), (['--patch','1,2,3'],'patch'), (['--encoder','resnet'],'resnet'),
                      (['--device','cuda:99'],'device'), (['--classes','lesion','--classes','liver'],'liver'), (['--init','nowhere.pth'],'nowhere.pth'), (['--augment','much'],'augment')]:
        refused(capfd, ['train',table,'--out',tmp_path/'run',*(['--init','random'] if '--init' not in more else []),*more], word)
    refused(capfd, ['predict',ct,'--weights',weights,'--out',tmp_path/'out','--overlap','1'], 'overlap')
    assert list(tmp_path.iterdir())==[]

def test_kinetics_offline(capfd, data, tmp_path, monkeypatch):
    "Without network and file, the error names the URL, the cache folder and the way out"
    import torch, urllib.error, urllib.request
    def no_network(*a, **k): raise urllib.error.URLError('no network')
    monkeypatch.setattr(urllib.request, 'urlopen', no_network); monkeypatch.setattr(torch.hub, 'urlopen', no_network)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path/'cache'))
    assert main(['train',str(data/'cases.csv'),'--out',str(tmp_path/'run'),'--init','kinetics'])==2
    announced,line = capfd.readouterr().err.splitlines()  # the first is torchvision's own: what it tries to download
    assert all(o in line for o in ('https://download.pytorch.org/models/r3d_18', str(tmp_path/'cache'), '--init random'))
    assert not (tmp_path/'run').exists()

def test_debug_shows_the_traceback(): 
    with pytest.raises(typer.BadParameter): main(['predict','nowhere.nii.gz','--weights',os.devnull,'--out','o','--debug'])

@pytest.mark.parametrize('argv,status', [(['--help'],0), (['predict','--help'],0), (['--version'],0), ([],2), (['frobnicate'],2), (['predict'],2)])
def test_console_script(argv, status):
    "The installed command: its status is the process's, its help is quick and complete"
    exe = Path(sys.executable).with_name('covid3d')
    r = subprocess.run([exe,*argv], capture_output=True, text=True, env={**os.environ,'COLUMNS':'100'})
    assert r.returncode==status and 'Traceback' not in r.stderr
    if argv==['--help']: assert all(re.search(rf'^│ {o} +\S', r.stdout, re.M) for o in ('demo','phantom','table','train','evaluate','predict'))

# any terminal, any machine

def started(*argv, sh='', **env):
    "`python -m covid3d` in a process of its own, `sh` after its words (`>&-`) or before (`ulimit …;`)"
    before,after = (sh, '') if sh.endswith(';') else ('', sh)
    words = ' '.join(f"'{o}'" for o in (sys.executable,'-m','covid3d',*argv))
    return subprocess.run(['bash','-c',f'{before} {words} {after}'], capture_output=True, text=True, env=os.environ|env|dict(OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore'))

@pytest.mark.promise('works')
@pytest.mark.parametrize('encoding', ['ascii','cp1252'])
def test_any_encoding(monkeypatch, tmp_path, weights, ct, encoding):
    "Help and results can be printed in any encoding: what it lacks is spelt, and no mask is lost to an arrow."
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, 'stdout', out)
    for argv in (['--help'], *([k,'--help'] for k in names), ['train','--help-all'], ['predict',str(ct),str(ct.with_name('phantom_001.nii.gz')),'--weights',str(weights),'--device','cpu','--out',str(tmp_path/'Müller')]):
        assert main(argv)==0
    text = out.buffer.getvalue().decode(encoding)
    assert 'phantom_001 -> phantom_001_lesion.nii.gz' in text and len(list((tmp_path/'Müller').glob('*.nii.gz')))==2

def test_closed_and_full_streams(tmp_path, weights, ct):
    "A closed stream is as good as /dev/null, and its number is given to no file; a full one ends in a line"
    for sh,status in [('>&-',0), ('2>&- >/dev/null',0), ('<&- >&- 2>&-',0)]: assert started('--help', sh=sh).returncode==status
    r = started('predict', ct, '--weights', weights, '--device','cpu', '--out', tmp_path/'m', sh='<&- >&- 2>&-')
    assert r.returncode==0 and nib.load(tmp_path/'m'/'phantom_000_lesion.nii.gz').get_fdata().shape==nib.load(ct).shape
    assert started('predict', '--help', sh='| true; exit ${PIPESTATUS[0]}').returncode in (0,141)
    if os.path.exists('/dev/full'):
        r = started('--help', sh='>/dev/full')
        assert r.returncode==2 and r.stderr.count('\n')==1 and 'No space left' in r.stderr

@pytest.mark.skipif(sys.platform!='linux', reason='ulimit -v is of Linux')
@pytest.mark.parametrize('kb', [60_000, 200_000, 1_000_000])
def test_too_little_memory_is_one_line(kb, ct, tmp_path):
    "Whether Python, numpy or PyTorch finds no room"
    r = started('predict', ct, '--weights', tmp_path/'w.safetensors', '--out', tmp_path/'m', sh=f'ulimit -v {kb};')
    assert r.returncode in (2,3) and r.stderr.count('\n')==1 and 'Traceback' not in r.stderr, r.stderr
    assert 'memory' in r.stderr or 'cannot be started' in r.stderr

@pytest.mark.fault('X11')
def test_too_few_open_files_is_one_line(weights, ct, tmp_path, capfd, monkeypatch):
    "Open files are few from the first import on, or run out in the middle"
    r = started('check', tmp_path/'nowhere.csv', sh='ulimit -n 6;')
    assert r.returncode in (2,3) and r.stderr.count('\n')==1 and 'Traceback' not in r.stderr, r.stderr
    def no_more(*a, **k): raise OSError(24, 'Too many open files', 'x')
    monkeypatch.setattr('covid3d.weights.load_model', no_more)
    refused(capfd, ['predict',ct,'--weights',weights,'--out',tmp_path/'n','--device','cpu'], 'too many files are open', 'ulimit -n')

def test_advice_names_options_that_exist():
    for name in names:
        options = {o for o in re.findall(r'--([a-z]+)', _one_line(MemoryError(), _options([name])))}
        assert options<=_options([name]), name
    assert 'Use a smaller --patch or --bs' in _one_line(MemoryError(), _options(['train'])) and '--patch' not in _one_line(MemoryError(), _options(['predict']))

@pytest.mark.promise('silent')
def test_no_error_is_swallowed(monkeypatch, capfd, tmp_path):
    "A RANK that is set in the environment silences no error: only of processes that torchrun started the first speaks for all."
    def failing(*a, **k): raise CTError('nowhere.csv', 'no such case table', 'Write one')
    monkeypatch.setattr('covid3d.learner.train', failing)
    torchrun = dict(RANK='1', WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT='29500')
    for env in (dict(RANK='1'), dict(RANK='x'), dict(RANK='1', WORLD_SIZE='1'), dict(RANK='1', WORLD_SIZE='2'), dict(WORLD_SIZE='y'), torchrun):
        for k in torchrun: monkeypatch.delenv(k, raising=False)
        for k,v in env.items(): monkeypatch.setenv(k, v)
        refused(capfd, ['predict','nowhere.nii.gz','--weights',os.devnull,'--out',tmp_path/'m'], 'nowhere.nii.gz')
        assert main(['train','nowhere.csv','--init','random','--device','cpu','--out',str(tmp_path/'r')])==2
        assert ('nowhere.csv' in capfd.readouterr().err)==(env!=torchrun)

@pytest.mark.fault('X13')
def test_statuses_of_signals(monkeypatch, capfd):
    "143 of a training that was ended by SIGTERM passes; Ctrl-C gives 130 and one line, wherever it comes"
    def raising(e):
        def f(): raise e
        return f
    monkeypatch.setattr(app, 'registered_commands', [*app.registered_commands])
    app.command('stop')(raising(SystemExit(143)))
    with pytest.raises(SystemExit) as e: main(['stop'])
    assert e.value.code==143
    app.command('stop')(raising(KeyboardInterrupt()))
    assert main(['stop'])==130 and capfd.readouterr().err=='stopped\n'
    monkeypatch.setattr('typer.main.get_command', lambda *a, **k: raising(KeyboardInterrupt())())
    assert main(['predict'])==130 and capfd.readouterr().err=='stopped\n'

@pytest.mark.fault('X2')
@pytest.mark.parametrize('device', ['meta','mkldnn','xla','cuda:99','banana','','cpu:x'])
def test_devices_that_cannot_compute(capfd, ct, weights, tmp_path, device):
    refused(capfd, ['predict',ct,'--weights',weights,'--out',tmp_path/'m','--device',device], 'device', 'Use --device cpu')
    assert not (tmp_path/'m').exists()

@pytest.mark.fault('X7')
@pytest.mark.skipif(not os.path.isdir('/proc/self'), reason='there is no /proc')
def test_places_that_cannot_be_written_to(capfd, ct, data, weights, tmp_path):
    for out in ('/proc/foo', '/dev/null', '/dev/null/x', 'x'*300, tmp_path/('x'*300)/'y'):
        refused(capfd, ['predict',ct,'--weights',weights,'--device','cpu','--out',out])
    (tmp_path/'file').touch()
    refused(capfd, ['predict',ct,'--weights',weights,'--out',tmp_path/'file'], 'file', 'Choose another --out')

@pytest.mark.fault('X7')
@pytest.mark.promise('works')
def test_a_folder_without_permission_is_refused_before_work(capfd, ct, weights, tmp_path, monkeypatch):
    "A folder that may not be written to is refused before anything is opened."
    (tmp_path/'m').mkdir()
    monkeypatch.setattr(os, 'access', lambda p, mode: False)
    monkeypatch.setattr('covid3d.weights.load_model', lambda *a: pytest.fail('weights were opened'))
    refused(capfd, ['predict',ct,'--weights',weights,'--out',tmp_path/'m'], tmp_path/'m', 'Choose another --out')

@pytest.mark.fault('K5')
def test_weights_that_are_no_file(capfd, ct, tmp_path):
    os.mkfifo(tmp_path/'f.safetensors'); (tmp_path/'d.safetensors').mkdir(); (tmp_path/'empty.safetensors').touch()
    for o in ('f.safetensors','d.safetensors','empty.safetensors','none.safetensors'):
        refused(capfd, ['predict',ct,'--weights',tmp_path/o,'--device','cpu','--out',tmp_path/'m'], o)
    refused(capfd, ['predict',ct,'--weights','w'*300+',x','--device','cpu','--out',tmp_path/'m'], 'www')
    assert not (tmp_path/'m').exists()

@pytest.mark.fault('X4')
@pytest.mark.parametrize('seed', ['100000000000000000000','-1','4294967296'])
def test_seeds_out_of_range(capfd, tmp_path, data, seed):
    for argv in (['phantom','-o',tmp_path/'p'], ['table',data,'-o',tmp_path/'c.csv'], ['train',data/'cases.csv','--out',tmp_path/'r'], ['demo','--out',tmp_path/'d']):
        refused(capfd, [*argv,'--seed',seed], '--seed', 'Give 0 or more' if seed=='-1' else 'Give 4294967295 or less')
    assert not list(tmp_path.iterdir())

@pytest.mark.fault('X4')
def test_overlap_out_of_range(capfd, ct, weights, tmp_path):
    for o in ('1','-0.1','nan','inf','x'): refused(capfd, ['predict',ct,'--weights',weights,'--out',tmp_path/'m','--overlap',o], 'overlap')
    assert not (tmp_path/'m').exists()

@pytest.mark.fault('X3')
def test_odd_words(capfd, tmp_path, weights):
    "What a user types reaches the terminal as one plain line"
    for argv in (['\x1b[31mred\n'], ['predict','x','--\x1b[31mred\n','y'], ['predict','a\0b','--weights',weights,'--out',tmp_path/'m'], ['train','\x1b[2Jx\ny.csv','--out',tmp_path/'m'],
                 ['check','\udcff.csv'], ['check','x'*5000+'.csv'], ['table','\x1b[2J\n','-o',tmp_path/'c.csv'], ['evaluate','/dev/null','--weights',weights,'--out',tmp_path/'m']):
        assert main([str(o) for o in argv])==2
        err = capfd.readouterr().err
        assert '\x1b' not in err and err.count('\n')==1 and 'unexpected' not in err, err
    assert not list(tmp_path.iterdir())

def test_a_name_that_the_locale_cannot_write(tmp_path):
    "A case name that an ASCII locale cannot encode is no unexpected error"
    (tmp_path/'t.csv').write_text('case,ct,lesion,split\né,s.nii.gz,m.nii.gz,test\n', encoding='utf8')
    env = {k:v for k,v in os.environ.items() if not k.startswith(('LC_','LANG'))}|dict(LC_ALL='POSIX', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0')
    res = subprocess.run([sys.executable,'-m','covid3d','check',str(tmp_path/'t.csv')], env=env, capture_output=True)
    assert res.returncode==1 and b'unexpected' not in res.stderr and b'no such file' in res.stdout+res.stderr, res

def test_tables_need_no_plots_and_no_torch():
    "Writing and checking a case table loads neither matplotlib nor PyTorch"
    code = "import sys, covid3d.cli, covid3d.cases, covid3d.datasets; print({*sys.modules} & {'matplotlib','torch','fastai'})"
    assert subprocess.run([sys.executable,'-c',code], capture_output=True, text=True).stdout=='set()\n'

# essentials first, and everything that can be refused is refused before PyTorch is loaded

def loaded(*argv):
    "Exit status, message, and which of the heavy packages a command loaded"
    code = f"import sys; from covid3d.cli import main; s = main({[str(o) for o in argv]}); print(s, *sorted({{*sys.modules}} & {{'torch','fastai','matplotlib'}}))"
    r = subprocess.run([sys.executable,'-c',code], capture_output=True, text=True, env=os.environ|dict(COLUMNS='100'))
    status,*heavy = r.stdout.splitlines()[-1].split()
    return int(status),r.stderr,heavy

@pytest.mark.parametrize('argv', ['--help', 'train --help', 'train --help-all', '--version', 'trian', 'train', 'train T --out O --epochs 0', 'train T --out O --spacing 3x2', 'train T --out O --augment much',
    'train none.csv --out O', 'train T --out O --config none.json', 'train T --out O --init none.pth', 'train T --out O --fold 1', 'train T --out O --folds 2 --fold 2', 'train T --out O --resume --overwrite',
    'train T --out RUN', 'train T --out /dev/null/x', 'train . --out O --spacing 3,2,2', 'predict none.nii --weights T --out O', 'predict T --weights none.safetensors --out O', 'predict --weights T --out O',
    'predict T --weights T --out O --already-windowed 20:-1000', 'predict T --weights T --out O --overlap nan', 'evaluate none.csv --weights T --out O', 'evaluate T --weights T --out O --compare none',
    'reproduce --weights none --out O', 'prepare none.csv --out O', 'check none.csv', 'table none', 'pretrain --out O --patients 2', 'demo -n 2', 'phantom --out O --layout x'])
def test_refused_before_torch_is_loaded(argv, tmp_path, data):
    "Help, and every error of arguments and files, comes without PyTorch"
    (tmp_path/'run').mkdir(); (tmp_path/'run'/'model.safetensors').touch()
    words = dict(T=data/'cases.csv', O=tmp_path/'out', RUN=tmp_path/'run')
    status,err,heavy = loaded(*(words.get(o, o) for o in argv.split()))
    fine = '--help' in argv or argv=='--version'
    assert heavy==[] and status==(0 if fine else 2) and err.count('\n')==(not fine), err

def test_essentials_fit_one_screen(capsys, monkeypatch):
    "`train --help`: a dozen options in one panel; `--help-all` has all of them; every line of an option says something"
    monkeypatch.setenv('COLUMNS', '100')
    assert main(['train','--help'])==0; short = capsys.readouterr().out
    assert main(['train','--help-all'])==0; long = capsys.readouterr().out
    options = lambda s: re.findall(r'^│ [ *] ? ?(--[\w-]+)', s, re.M)+re.findall(r'^│ (--[\w-]+)', s, re.M)
    assert len(short.splitlines())<=40 and len({*options(short)})<=12 and '--help-all' in short
    assert {f'--{k.replace("_","-")}' for k in _options(['train'])}-{'--table','--debug','--help-all'}<={*options(long)}

def test_quiet_prints_paths_and_nothing_else(data, weights, ct, tmp_path, capfd):
    "With --quiet, standard output holds the paths of the results"
    small = ['--init','random','--width','4','--spacing','9,5,5','--patch','16,48,48','--epochs','1','--patches','2','--device','cpu']
    for argv,paths in [(['table',data,'-o',tmp_path/'t.csv'], ['t.csv']), (['check',data/'cases.csv'], []), (['train',data/'cases.csv','-o',tmp_path/'run',*small], ['run/model.safetensors']),
                       (['predict','-i',ct,'--weights',weights,'-o',tmp_path/'m','--device','cpu'], ['m/phantom_000_lesion.nii.gz']),
                       (['evaluate',data/'cases.csv','--weights',weights,'-o',tmp_path/'s','--device','cpu'], ['s/index.html'])]:
        assert main([*map(str, argv),'-q'])==0
        assert capfd.readouterr().out.splitlines()==[str(tmp_path/p) for p in paths]

def test_a_recipe_and_options_that_change_it(data, tmp_path, capfd):
    "--config is a name or a file, options change it, and what is in neither is refused by name"
    small = dict(epochs=1, patches=2, init='random', net=dict(width=4), spec=dict(spacing=[9,5,5], patch=[16,48,48]))
    (tmp_path/'r.json').write_text(json.dumps(small))
    assert main(['train',str(data/'cases.csv'),'-o',str(tmp_path/'run'),'--config',str(tmp_path/'r.json'),'--up','trilinear','--device','cpu'])==0
    _,ct_spec,net = load_model(tmp_path/'run'/'model.safetensors')
    assert (ct_spec.spacing,ct_spec.patch,net.width,net.up)==((9,5,5),(16,48,48),4,'trilinear')
    (tmp_path/'r.json').write_text('{"epoch": 3}')
    refused(capfd, ['train',data/'cases.csv','-o',tmp_path/'x','--config',tmp_path/'r.json'], "no setting 'epoch'. Did you mean epochs?\n")
    assert not (tmp_path/'x').exists()

def test_lists_are_lists(data, weights, ct, tmp_path, capfd):
    "Scans as arguments and after -i; several models; a comma is part of a name"
    b = tmp_path/'b,c.safetensors'; b.write_bytes(weights.read_bytes())
    w = ['--weights',str(weights),'--weights',str(b),'--device','cpu']
    assert main(['predict',str(ct),'-i',str(ct.with_name('phantom_001.nii.gz')),'-i',str(ct.with_name('phantom_002.nii.gz')),*w,'-o',str(tmp_path/'m')])==0
    assert len(list((tmp_path/'m').glob('*.nii.gz')))==3

def test_completion(tmp_path):
    "Commands, options and choices complete in a shell"
    def complete(words):
        env = os.environ|dict(_COVID3D_COMPLETE='complete_bash', COMP_WORDS=words, COMP_CWORD=str(len(words.split())-1))
        return subprocess.run([Path(sys.executable).with_name('covid3d')], env=env, capture_output=True, text=True).stdout.split()
    assert complete('covid3d pre')==['prepare','pretrain','predict'] and '--ema' in complete('covid3d train --e') and complete('covid3d train --augment l')==['light']
