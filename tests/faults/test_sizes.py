"Files that claim more than they hold, and limits of the system: one line, and no memory taken for what is not there"
import errno, json, os, subprocess, sys, time
from dataclasses import asdict, replace

import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, strategies as st

from covid3d import inference, weights
from covid3d.cases import bare_cell, read_cases, safe_cell
from covid3d.cli import main
from covid3d.statistics import read_scores
from covid3d.weights import NetSpec, save_model
from covid3d.transforms import CTSpec
from covid3d.volume import CTError, canonical_affine, open_ct, plain, save_volume
from coarse import cached
from safetensors.torch import save

def refused(f, *words):
    "`f` raises a one-line `CTError` that holds `words`"
    with pytest.raises(CTError) as e: f()
    assert '\n' not in str(e.value) and all(str(w) in str(e.value) for w in words), e.value

def sparse(path, size, head=b''):
    "A file of `size` bytes of which the disk holds the first"
    with open(path, 'wb') as f: f.write(head); f.truncate(size)
    if 512*path.stat().st_blocks>size//60: pytest.skip('this disk stores the zeros of a file')

@pytest.mark.promise('executed')
@pytest.mark.parametrize('read', [read_scores, read_cases])
def test_a_table_of_a_hundred_gigabytes(tmp_path, read):
    "A table that claims 100 GB is refused by its size"
    sparse(tmp_path/'t.csv', 10**11, b'case,dice,tp,fp,fn,empty,error\n')
    start = time.monotonic()
    refused(lambda: read(tmp_path/'t.csv'), 't.csv', 'larger than')
    assert time.monotonic()-start<60

@pytest.mark.promise('executed')
@pytest.mark.parametrize('change,word', [(dict(patch=(256,512,512)),'voxels'), (dict(patch=(2**20,32,32)),'voxels'), (dict(patch=(4,4,2**30)),'voxels')])
def test_a_patch_that_no_network_needs(change, word):
    "A specification whose patch has more than 256³ voxels is refused"
    refused(lambda: CTSpec(**dict(spacing=(4,2.8,2.8))|change), 'patch', word)

@pytest.mark.promise('executed')
@pytest.mark.promise('named')
def test_a_spacing_that_fills_the_memory(tmp_path, capfd):
    "Weights whose spacing would make more than 2²⁸ voxels of a wide scan: one line for the scan, nothing written"
    save_volume(replace(cached(0).ct, affine=canonical_affine((9,5.5,5.5))), tmp_path/'scan.nii.gz')
    spec,net = CTSpec(spacing=(.6,.6,.6), patch=(16,32,32)),NetSpec(width=4)
    save_model(net.build(spec.classes), tmp_path/'w.safetensors', spec, net)
    assert main(['predict',str(tmp_path/'scan.nii.gz'),'--weights',str(tmp_path/'w.safetensors'),'--out',str(tmp_path/'m'),'--device','cpu'])==1
    out = ''.join(capfd.readouterr())
    assert '0.6×0.6×0.6 mm would make' in out and 'coarser spacing' in out and not [*(tmp_path/'m').glob('*.nii.gz')]

def forged(path, net=NetSpec(width=4), **changes):
    "Weights with another `CTSpec`, and a digest that fits"
    good = CTSpec(spacing=(9,5,5), patch=(16,48,48))
    state = net.build(['lesion']).state_dict()
    about = dict(format=1, ct=asdict(good)|changes, net=asdict(net), seen=None)
    path.write_bytes(save(state, dict(covid3d=json.dumps(about|dict(digest=weights._digest(json.loads(json.dumps(about)), state))))))
    return path

@pytest.mark.fault('K11')
@pytest.mark.promise('executed')
@pytest.mark.parametrize('changes', [dict(patch=[256,512,512]), dict(spacing=[.5,.5,.5]), dict(spacing=[.05,100,100], patch=[4,4,1025])], ids=str)
def test_weights_that_ask_for_gigabytes_are_named(tmp_path, capfd, changes):
    "Weights whose patch or spacing would fill the memory are refused in one line that names their file, and nothing is written"
    ct,w = tmp_path/'scan.nii.gz',forged(tmp_path/'w.safetensors', **changes)
    save_volume(cached(0).ct, ct)
    assert main(['predict',str(ct),'--weights',str(w),'--out',str(tmp_path/'m'),'--device','cpu'])==2
    err = capfd.readouterr().err
    assert err.count('\n')==1 and 'w.safetensors: the specification cannot be read' in err and not (tmp_path/'m').exists()

@pytest.mark.fault('D14','K11')
@pytest.mark.promise('silent')
def test_a_window_that_does_not_fit_is_told_with_its_weights(tmp_path, monkeypatch):
    "A window that needs more memory than is left is told before a scan is opened, with the file of the weights and both numbers"
    w = forged(tmp_path/'w.safetensors', NetSpec(width=32), patch=[192,256,256])
    monkeypatch.setattr(inference, 'memory_left', lambda: 2**29)
    refused(lambda: inference.Segmenter.load(w, 'cpu'), w, 'a window of 192×256×256 voxels needs', 'and 512 MiB are left')
    monkeypatch.setattr(inference, 'memory_left', lambda: 2**40)
    assert inference.Segmenter.load(w, 'cpu').spec.patch==(192,256,256)

def test_windows_at_a_time_are_fewer_where_they_are_large():
    "The batch of the sliding window shrinks with the window, and its memory is counted as it is taken"
    sizes = []
    class Same(torch.nn.Module):
        def forward(self, x): sizes.append(len(x)); return x
    x = torch.rand(1,256,256,64)
    p = inference.sliding_window(Same(), x, (128,128,64), 0)
    assert sizes==[4] and torch.allclose(p, x.sigmoid())
    sizes.clear(); inference.sliding_window(Same(), torch.rand(1,512,128,64), (256,128,64), 0); assert sizes==[2]
    assert [inference._at_once(o) for o in ((16,96,96),(160,160,160),(256,256,256))]==[4,1,1]

@pytest.mark.fault('K6')
@pytest.mark.parametrize('classes', [('ground-glass',), ('a'*64,), tuple(f'c{i}' for i in range(64))], ids=lambda o: o[0])
def test_what_trains_can_be_opened(tmp_path, classes):
    "The bounds of a specification are the same where weights are written and where they are opened"
    spec,net = CTSpec(spacing=(9,5,5), patch=(16,48,48), classes=classes),NetSpec(width=4)
    save_model(net.build(classes), tmp_path/'w.safetensors', spec, net)
    assert weights.load_model(tmp_path/'w.safetensors')[1]==spec

@pytest.mark.fault('K7')
@pytest.mark.promise('executed')
def test_weights_that_are_a_hole(tmp_path):
    "Weights that claim gigabytes of which some kilobytes are stored are refused before memory is taken"
    head = json.dumps(dict(w=dict(dtype='F32', shape=[2**29], data_offsets=[0,2**31]))).encode()
    sparse(tmp_path/'w.safetensors', 8+len(head)+2**31, len(head).to_bytes(8, 'little')+head)
    refused(lambda: weights.load_model(tmp_path/'w.safetensors'), 'w.safetensors', 'sparse file')

@pytest.mark.fault('K13','D4')
@pytest.mark.promise('executed')
def test_a_prepared_array_that_is_a_hole(tmp_path):
    "An array of a prepared folder that claims gigabytes of which some kilobytes are stored is refused unread"
    from covid3d.prepare import _map
    with open(tmp_path/'ct.npy', 'wb') as f: np.lib.format.write_array_header_1_0(f, dict(descr='|u1', fortran_order=False, shape=(1,1024,1024,1024))); n = f.tell()
    sparse(tmp_path/'ct.npy', n+2**30, (tmp_path/'ct.npy').read_bytes())
    refused(lambda: _map(tmp_path/'ct.npy', np.uint8, (1,1024,1024,1024)), 'ct.npy', 'sparse file')

@pytest.mark.promise('executed')
@pytest.mark.parametrize('text,word', [('x'*70_000+'\n', 'a line of more than'), ('case,dice,tp,fp,fn,empty,error,dice\n', "two columns called 'dice'")], ids=['line','column'])
def test_scores_that_are_no_scores(tmp_path, text, word):
    "A table of scores with a line of any length, or with two columns of one name, is refused in one line"
    (tmp_path/'s.csv').write_text(text)
    refused(lambda: read_scores(tmp_path/'s.csv'), 's.csv', word)

@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='needs named pipes')
def test_scores_that_are_a_pipe(tmp_path):
    "A pipe in the place of a table of scores is refused as that, and not waited for"
    os.mkfifo(tmp_path/'s.csv')
    refused(lambda: read_scores(tmp_path/'s.csv'), 's.csv', 'not a regular file')

def test_a_table_of_too_many_rows(tmp_path):
    "More than 100,000 lines are refused with their number"
    (tmp_path/'t.csv').write_text('case,ct\n'+''.join(f'c{i},s{i}\n' for i in range(100_001)))
    refused(lambda: read_cases(tmp_path/'t.csv'), 't.csv', '100,001 lines', 'Divide it')

@pytest.mark.promise('silent')
def test_two_sources_of_one_scan(tmp_path):
    "A table of sources that gives two places for one scan is refused, not read as one of them"
    from covid3d.cases import source_columns
    (tmp_path/'t.csv').write_text('case,ct\na,a\n')
    (tmp_path/'t_sources.csv').write_text(','.join(source_columns)+'\na,x.nii,\na,y.nii,\n')
    refused(lambda: read_cases(tmp_path/'t.csv'), 't_sources.csv', 'two sources for a')

@pytest.mark.promise('silent')
def test_two_columns_of_one_name(tmp_path):
    "A case table with two columns called ct is refused, not read as one of them"
    for sep in ',;\t':
        (tmp_path/'t.csv').write_text(sep.join(['case','ct','lesion','ct'])+'\n'+sep.join(['a','a.nii','','b.nii'])+'\n')
        refused(lambda: read_cases(tmp_path/'t.csv'), 't.csv', "two columns called 'ct'")

def test_a_table_of_many_rows(tmp_path):
    "The time to read a table grows with its rows, not with their square"
    def secs(n):
        pd.DataFrame([dict(case=f'c{i}', ct=f'{i}.nii', lesion=f'l{i}.nii', patient=f'p{i}', split='train') for i in range(n)]).to_csv(tmp_path/'t.csv', index=False)
        start = time.process_time(); assert len(read_cases(tmp_path/'t.csv'))==n
        return time.process_time()-start
    secs(100)
    assert secs(20_000)<100*secs(1000)

@pytest.mark.promise('executed')
@given(st.text())
def test_no_control_character_reaches_a_table(s):
    "A cell of a table that covid3d writes is one printable line, and no formula"
    s = safe_cell(s)
    assert not any(ord(c)<32 or 127<=ord(c)<160 for c in s) and not s.startswith(('=','+','@','-'))

@pytest.mark.promise('executed')
def test_a_patient_with_an_escape(tmp_path):
    "An escape sequence in the column `patient` does not reach the scores"
    from covid3d.statistics import scores_csv
    (tmp_path/'t.csv').write_text('case,ct,patient\na,a.nii,p\x1b[2J1\n')
    assert read_cases(tmp_path/'t.csv')[0].patient=='p [2J1'
    assert b'\x1b' not in scores_csv(pd.DataFrame([dict(case='a', patient='\x1b[2Jp', dice=.5)]))

@pytest.mark.fault('S6')
@given(st.text(st.characters(exclude_categories=('Cs',))))
def test_a_safe_cell_reads_back(s):
    "What a cell was made safe with is taken off again on reading"
    assert bare_cell(safe_cell(s))==plain(s) or s.startswith("'")

@pytest.mark.promise('executed')
def test_no_escape_reaches_a_page(tmp_path):
    "Titles, notes and cells of a report lose their control characters and cannot be HTML"
    from covid3d.score_page import render_scores
    odd = '\x1b[2J<b>\x9b1m"\x07<i>'
    page = render_scores('reproduction.html', title=odd, lead=odd, head=[odd], rows=[[odd,odd]], pages={odd:odd}, left_out=[[odd]],
                  notes=[odd], about={odd:odd}).decode()
    assert page.count('&lt;b&gt;')==12 and not any(ord(c)<32 and c!='\n' or 127<=ord(c)<160 for c in page) and '<b>' not in page and '<i>' not in page

few = """
import os, resource, sys
from covid3d.cli import main
import covid3d.inference, covid3d.predict
from covid3d.volume import open_ct
held = []
while True:
    try: held.append(os.open(os.devnull, os.O_RDONLY))
    except OSError: break
    if len(held)==1: resource.setrlimit(resource.RLIMIT_NOFILE, (held[0]+6, held[0]+6))
try: open_ct(sys.argv[1])
except Exception as e: os.write(2, f'{type(e).__name__}: {e}\\n'.encode())
os._exit(0)
"""

@pytest.mark.fault('X11')
@pytest.mark.promise('silent')
@pytest.mark.parametrize('name', ['scan.nii','scan.nii.gz'])
def test_too_many_open_files(tmp_path, name):
    "A sound scan that the system does not let us open is not called damaged"
    save_volume(cached(0).ct, tmp_path/name)
    res = subprocess.run([sys.executable,'-c',few,str(tmp_path/name)], capture_output=True, text=True)
    assert res.stderr.count('\n')==1 and f'{name}: cannot be read (Too many open files). Raise the limit on open files with ulimit -n' in res.stderr, res.stderr

@pytest.mark.fault('X11')
@pytest.mark.promise('silent')
@pytest.mark.parametrize('command', ['check','evaluate','predict'])
@pytest.mark.parametrize('number', [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_a_lack_of_the_system_stops_the_batch(tmp_path, monkeypatch, capfd, command, number):
    "Where the system has no files or memory left, a command stops with one line instead of calling each scan damaged"
    for i in range(2): save_volume((ph := cached(i)).ct, tmp_path/f'{i}.nii.gz'); save_volume(ph.lesion, tmp_path/f'{i}_m.nii.gz')
    (tmp_path/'t.csv').write_text('case,ct,lesion,split\n'+''.join(f'c{i},{i}.nii.gz,{i}_m.nii.gz,test\n' for i in range(2)))
    w = forged(tmp_path/'w.safetensors')
    def short(*a, **k): raise OSError(number, os.strerror(number))
    monkeypatch.setattr('covid3d.nifti.igzip.open', short)
    more = [] if command=='check' else ['--weights',str(w),'--out',str(tmp_path/'m'),'--device','cpu']
    assert main([command,str(tmp_path/'t.csv'),*more])==2
    err = [o for o in capfd.readouterr().err.split('\n') if o.strip() and '%|' not in o and 'it/s' not in o]
    assert len(err)==1 and os.strerror(number) in err[0] and 'damaged' not in err[0], err
    assert not [*(tmp_path/'m').glob('*.nii.gz')]

@pytest.mark.fault('X11','K13')
@pytest.mark.promise('lost')
def test_a_prepared_case_outlives_a_lack_of_files(tmp_path, monkeypatch):
    "A prepared case that the system does not let us open is neither called damaged nor removed"
    from covid3d.prepare import open_prepared, prepare_case
    ph = cached(0); save_volume(ph.ct, tmp_path/'a.nii'); save_volume(ph.lesion, tmp_path/'m.nii')
    (tmp_path/'t.csv').write_text('case,ct,lesion\na,a.nii,m.nii\n')
    case,spec = read_cases(tmp_path/'t.csv')[0],CTSpec(spacing=(9,5,5), patch=(16,48,48))
    prepare_case(case, spec, tmp_path/'p')
    home, = (o for o in (tmp_path/'p').iterdir() if o.is_dir())
    def short(*a, **k): raise OSError(24, 'Too many open files')
    with monkeypatch.context() as m:
        m.setattr('covid3d.prepare.np.memmap', short)
        refused(lambda: open_prepared(home), 'Too many open files', 'ulimit -n')
        refused(lambda: prepare_case(case, spec, tmp_path/'p'), 'Too many open files')
    assert open_prepared(home) is not None

@pytest.mark.fault('C1','X11')
@pytest.mark.promise('silent')
def test_a_slice_that_cannot_be_opened_now_is_not_missing(tmp_path, monkeypatch):
    "A slice of a DICOM series that the system does not let us open is not left out of the series"
    import covid3d.dicom as dicom, covid3d.dicom_file as dicom_file
    dicom.write_series(cached(0).ct, tmp_path/'s')
    real,n = dicom_file._open,[0]
    def short(p):
        n[0] += 1
        if n[0]>5: raise OSError(24, 'Too many open files', str(p))
        return real(p)
    monkeypatch.setattr(dicom_file, '_open', short)
    refused(lambda: dicom.open_scan(tmp_path/'s'), 'Too many open files', 'ulimit -n')

@pytest.mark.fault('X11')
@pytest.mark.promise('silent')
def test_a_disk_that_fails_is_told_as_that(tmp_path, monkeypatch):
    "A read error of the disk is told as that and not as damage of the gzip stream"
    save_volume(cached(0).ct, tmp_path/'a.nii.gz')
    def broken(*a, **k): raise OSError(5, 'Input/output error')
    monkeypatch.setattr('covid3d.nifti.igzip.open', broken)
    refused(lambda: open_ct(tmp_path/'a.nii.gz'), 'a.nii.gz: cannot be read (Input/output error). Check the disk')
