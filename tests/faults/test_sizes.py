"Files that claim more than they hold, and limits of the system: one line, and no memory taken for what is not there"
import os, subprocess, sys, time

import pandas as pd, pytest
from hypothesis import given, strategies as st

from covid3d.cases import read_cases, safe_cell
from covid3d.cli import main
from covid3d.evaluate import read_scores
from covid3d.inference import NetSpec, save_model
from covid3d.phantom import phantom
from covid3d.pretrain import read_study
from covid3d.transforms import CTSpec
from covid3d.volume import CTError, save_volume

def refused(f, *words):
    "`f` raises a one-line `CTError` that holds `words`"
    with pytest.raises(CTError) as e: f()
    assert '\n' not in str(e.value) and all(str(w) in str(e.value) for w in words), e.value

def sparse(path, size, head=b''):
    "A file of `size` bytes of which the disk holds the first"
    with open(path, 'wb') as f: f.write(head); f.truncate(size)
    if 512*path.stat().st_blocks>size//60: pytest.skip('this disk stores the zeros of a file')

@pytest.mark.promise('executed')
@pytest.mark.parametrize('read', [read_scores, read_study, read_cases])
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
    "Weights whose spacing would make more than 2²⁸ voxels of a scan: one line for the scan, nothing written"
    save_volume(phantom(0, (32,96,96), (9,3.7,3.7)).ct, tmp_path/'scan.nii.gz')
    spec,net = CTSpec(spacing=(.1,.1,.1), patch=(16,32,32)),NetSpec(width=4)
    save_model(net.build(spec.classes), tmp_path/'w.safetensors', spec, net)
    assert main(['predict',str(tmp_path/'scan.nii.gz'),'--weights',str(tmp_path/'w.safetensors'),'--out',str(tmp_path/'m'),'--device','cpu'])==1
    out = ''.join(capfd.readouterr())
    assert '0.1×0.1×0.1 mm would make' in out and 'coarser spacing' in out and not [*(tmp_path/'m').glob('*.nii.gz')]

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
    from covid3d.evaluate import scores_csv
    assert b'\x1b' not in scores_csv(pd.DataFrame([dict(case='a', patient='\x1b[2Jp', dice=.5)]))

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
    save_volume(phantom(0, (32,96,96), (9,3.7,3.7)).ct, tmp_path/name)
    res = subprocess.run([sys.executable,'-c',few,str(tmp_path/name)], capture_output=True, text=True)
    assert res.stderr.count('\n')==1 and f'{name}: cannot be read (Too many open files). Raise the limit on open files with ulimit -n' in res.stderr, res.stderr
