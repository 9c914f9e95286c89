"Download of CoronaCases from a local server in Zenodo's place, with every fault a network or an archive can have"
import hashlib, io, re, shutil, stat, subprocess, sys, threading, zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pytest

from covid3d import download
from covid3d.cases import read_cases
from covid3d.cli import main
from covid3d.download import _unpack, instructions
from covid3d.files import locked
from covid3d.volume import CTError, Volume, canonical_affine, save_volume

each = pytest.mark.parametrize
scans,lesions,lungs = wanted = 'COVID-19-CT-Seg_20cases.zip','Infection_Mask.zip','Lung_Mask.zip'
folders = sorted(Path(o).stem for o in wanted)
cases = ['coronacases_001','radiopaedia_10_85902_1']

class Answer(BaseHTTPRequestHandler):
    "One answer of the server; HTTP/1.0, so its end is the end of the connection"
    def log_message(self, *args): pass
    def head(self, status, **headers):
        self.send_response(status)
        for k,v in headers.items(): self.send_header(k.replace('_','-'), str(v))
        self.end_headers()
    def do_GET(self):
        z,name = self.server.zenodo,self.path.split('/')[-1]
        z.log.append(name)
        try: self.file(z, name)
        except (BrokenPipeError,ConnectionResetError): pass  # the client has heard enough
    def file(self, z, name):
        body = z.files[name]
        status = z.status.pop(0) if z.status else 200
        if status!=200: return self.head(status)
        if z.html: self.head(200, Content_Type='text/html; charset=utf-8'); self.wfile.write(b'<html>Please log in</html>'*100); return
        if z.mode=='chunked':
            self.head(200, Transfer_Encoding='chunked')
            for i in range(0, len(body), 5000): c = body[i:i+5000]; self.wfile.write(b'%x\r\n%s\r\n' % (len(c), c))
            self.wfile.write(b'0\r\n\r\n'); return
        if z.mode=='endless':
            self.head(200, Content_Type='application/octet-stream'); self.wfile.write(body)
            while True: self.wfile.write(bytes(2**16))
        self.head(200, Content_Length=len(body))
        cut = z.cuts.pop(0) if z.cuts else None
        self.wfile.write(body if cut is None else body[:cut])

class Zenodo(SimpleNamespace):
    "What the server holds, how it misbehaves, and what it was asked"
    def __init__(self, files, url):
        super().__init__(files=dict(files), log=[], cuts=[], status=[], html=False, mode='', url=url)

def zipped(entries, top='', method=zipfile.ZIP_DEFLATED)->bytes:
    "A zip of name → content"
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w', method) as z:
        for k,v in entries.items(): z.writestr(top+k, v)
    return out.getvalue()

@pytest.fixture(scope='module')
def archives(tmp_path_factory):
    "Two tiny scans in the three archives of CoronaCases; one has a top folder and a Mac's litter, and the scans take several pieces of 1 MiB"
    tmp,rng = tmp_path_factory.mktemp('archives'),np.random.default_rng(0)
    vol = lambda low,high,kind: Volume(rng.integers(low, high, (8,16,16)).astype(kind), canonical_affine((5,3,3)))
    for i,c in enumerate(cases):
        save_volume(vol(0,256,np.uint8) if i else vol(-1000,400,np.int16), tmp/'ct'/f'{c}.nii.gz')
        for k in ('lesion','lung'): save_volume(vol(0,2,np.uint8), tmp/k/f'{c}.nii.gz')
    of = lambda k: {f'{c}.nii.gz':(tmp/k/f'{c}.nii.gz').read_bytes() for c in cases}
    return {scans:zipped(of('ct')|{'notes.bin':rng.bytes(2_700_000)}, method=zipfile.ZIP_STORED), lungs:zipped(of('lung')),
            lesions:zipped({f'Infection_Mask/{k}':v for k,v in of('lesion').items()}|{'__MACOSX/Infection_Mask/._a.nii.gz':b'x',
                'Infection_Mask/.DS_Store':b'x'})}

@pytest.fixture
def zenodo(archives, monkeypatch):
    "The server, and the command line turned to it"
    server = ThreadingHTTPServer(('127.0.0.1',0), Answer); server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=.01)); thread.start()
    server.zenodo = Zenodo(archives, f'http://127.0.0.1:{server.server_port}')
    monkeypatch.setattr(download, 'record_url', server.zenodo.url)
    monkeypatch.setattr(download, 'record_sha256', {k:hashlib.sha256(archives[k]).hexdigest() for k in wanted})
    monkeypatch.setattr(download, '_room', 2**24)
    monkeypatch.setattr('time.sleep', lambda s: None)  # between two tries
    for k in ('http_proxy','HTTP_PROXY','all_proxy','ALL_PROXY'): monkeypatch.delenv(k, raising=False)
    yield server.zenodo
    server.shutdown(); thread.join(); server.server_close()

@pytest.fixture
def out(tmp_path): return tmp_path/'corona'

def get(out): return main(['download','coronacases','-o',str(out)])
def names(out): return sorted(o.name for o in out.iterdir()) if out.exists() else []

def refused(capfd, out, *words):
    "Exit status 2, and one line that holds `words` and ends with a remedy"
    assert get(out)==2
    err = capfd.readouterr().err
    assert err.count('\n')==1 and err.endswith(('.\n','?\n')) and 'Traceback' not in err and all(str(w) in err for w in words), err

def complete(out):
    "The three folders and nothing else, every file whole"
    assert names(out)==folders
    assert all((out/d/f'{c}.nii.gz').stat().st_size>100 for d in folders for c in cases)

# The way it should go

def test_whole_way(zenodo, out, tmp_path, capfd):
    "download → the command it names → scans that open; the windowed ones get their window"
    assert get(out)==0
    said = capfd.readouterr().out
    assert 'CC BY-NC-SA 4.0' in said and '10.5281/zenodo.3757476' in said
    complete(out); assert not list(out.rglob('.*')) and not (out/'__MACOSX').exists()
    argv = re.search(r'next: covid3d (.*) -o cases.csv', said)[1].split()
    assert main([*argv,'-o',str(tmp_path/'cases.csv')])==0
    a,b = read_cases(tmp_path/'cases.csv')
    assert ((a.name,a.split),(b.name,b.split))==((cases[0],'test'),(cases[1],'')) and b.open_ct().data.min()>=-1250
    assert all(c.open_mask(k, c.open_ct()).data.any() for c in (a,b) for k in ('lesion','lung'))

def test_second_run_downloads_nothing(zenodo, out):
    assert get(out)==0 and len(zenodo.log)==3
    assert get(out)==0 and len(zenodo.log)==3

def test_only_what_is_missing(zenodo, out):
    assert get(out)==0
    shutil.rmtree(out/'Lung_Mask'); zenodo.log.clear()
    assert get(out)==0 and zenodo.log==[lungs]; complete(out)

def test_archive_that_is_there_is_used(zenodo, out):
    "An archive fetched by hand counts if its checksum is right, else it is fetched again"
    out.mkdir(); (out/scans).write_bytes(zenodo.files[scans]); (out/lungs).write_bytes(b'not it')
    assert get(out)==0; complete(out)
    assert sorted(zenodo.log)==[lesions,lungs]

# A bad line

def test_cut_is_tried_again_in_the_same_run(zenodo, out):
    zenodo.cuts = [1_500_000]
    assert get(out)==0; complete(out)
    assert zenodo.log==[scans,scans,lesions,lungs]

def test_cut_in_every_try(zenodo, out, capfd):
    "All tries cut: one line, nothing half is left, what was complete stays, and the next run asks for the rest only"
    zenodo.status,zenodo.cuts = [200,404,404,404,404],[]
    refused(capfd, out, lesions, '404'); assert names(out)==[Path(scans).stem]
    zenodo.log.clear(); zenodo.cuts = [100,0,50,10]
    refused(capfd, out, lesions, 'failed or was cut', 'run the same command again')
    assert zenodo.log==4*[lesions] and names(out)==[Path(scans).stem]
    zenodo.log.clear()
    assert get(out)==0 and zenodo.log==[lesions,lungs]; complete(out)

def test_killed_while_downloading(zenodo, out):
    "kill -9 in the middle of a file: what had come is no archive, and the next run removes it"
    code = ("import os, sys; from covid3d import download\n"
            "def die(url, path, pooch):\n    open(path, 'wb').write(b'PK'); os.kill(os.getpid(), 9)\n"
            "download._download = die; download.fetch_coronacases(sys.argv[1])")
    assert subprocess.run([sys.executable,'-c',code,str(out)]).returncode==-9
    left, = out.glob('.covid3d-*.tmp'); assert left.is_dir() and list(left.iterdir())
    assert get(out)==0; complete(out); assert not list(out.glob('.*'))

def test_chunked(zenodo, out):
    "A body sent in small pieces without its length, as proxies do"
    zenodo.mode = 'chunked'
    assert get(out)==0; complete(out); assert len(zenodo.log)==3

def test_endless(zenodo, out, capfd, monkeypatch):
    "A body without an end stops at the largest size that an archive may have, and leaves nothing that spoils the next run"
    zenodo.mode = 'endless'; monkeypatch.setattr(download, '_most_packed', 3*2**20)
    refused(capfd, out, scans, 'more than 3,145,728 bytes came'); assert names(out)==[] and zenodo.log==[scans]
    zenodo.mode = ''
    assert get(out)==0; complete(out)

@each('status', [404,403,500,503])
def test_file_not_to_be_had(zenodo, out, capfd, status):
    zenodo.status = [status]*4
    refused(capfd, out, scans)
    assert not (out/Path(scans).stem).exists()
    zenodo.status = []
    assert get(out)==0; complete(out)

@each('status', [404,500])
def test_status_is_told(zenodo, out, capfd, status):
    "A file that the server refuses is not a connection that was cut"
    zenodo.status = [status]*4
    refused(capfd, out, str(status))

def test_one_error_is_passed_over(zenodo, out):
    zenodo.status = [503]
    assert get(out)==0 and len(zenodo.log)==4; complete(out)

def test_no_server(zenodo, capfd, out, monkeypatch):
    monkeypatch.setattr(download, 'record_url', 'http://127.0.0.1:9')
    refused(capfd, out, '127.0.0.1:9', 'the connection failed', 'Check the network')
    assert names(out)==[]

# A server that lies

@pytest.mark.fault('K8')
def test_wrong_checksum(zenodo, out, capfd):
    "Changed on the way: nothing is kept, nothing is unpacked"
    good = zenodo.files[scans]
    zenodo.files[scans] = good[:-1]+bytes([good[-1]^1])
    refused(capfd, out, scans, 'checksum')
    assert names(out)==[]
    zenodo.files[scans] = good
    assert get(out)==0; complete(out)

@pytest.mark.fault('K8')
def test_web_page_for_a_file(zenodo, out, capfd):
    zenodo.html = True
    refused(capfd, out, scans, 'a web page came', 'login')
    assert names(out)==[]

def test_checksums_come_from_no_server():
    "They are SHA-256 that stand in the code, one for each archive"
    assert sorted(download.record_sha256)==sorted(wanted)
    assert all(re.fullmatch('[0-9a-f]{64}', o) for o in download.record_sha256.values())

# The archives

def broken(path, damage, entries={'a.nii.gz':b'one'*500,'b.nii.gz':b'two'*500}):
    "An archive of A, its bytes damaged"
    path.write_bytes(damage(zipped(entries))); return path

def no_unpack(path, match, folder='A'):
    "Refused in one line, and neither the folder nor anything else was written"
    before = names(path.parent)
    with pytest.raises(CTError, match=match) as e: _unpack(path, path.parent/folder)
    assert '\n' not in str(e.value) and len(e.value.remedy)>5 and names(path.parent)==before

@pytest.mark.fault('K9')
@each('name', ['../evil','a/../../evil','/evil','//evil','\\evil','a\\..\\..\\evil','C:\\evil','c:/evil','C:evil'])
def test_escape(tmp_path, name): no_unpack(broken(tmp_path/'a.zip', bytes, {'fine':b'x', name:b'x'}), 'leads out of its folder')

@pytest.mark.fault('K9')
@each('name', ['A//{}/evil','A//../evil','A/C:/evil','A/\\evil','A/../evil'])
def test_escape_behind_the_top_folder(tmp_path, name):
    "The top folder that is not doubled must not lay open an absolute path behind it"
    aim = tmp_path/'aim'; aim.mkdir()
    no_unpack(broken(tmp_path/'a.zip', bytes, {'A/fine':b'x', name.format(str(aim)[1:]):b'x'}), 'leads out of its folder')
    assert names(aim)==[]

def odd_entry(**change):
    "An entry whose ZipInfo differs"
    info = zipfile.ZipInfo('link')
    for k,v in change.items(): setattr(info, k, v)
    return info

@pytest.mark.fault('K9')
@each('aim', ['/etc/passwd','../../x','a'])
def test_link(tmp_path, aim):
    with zipfile.ZipFile(tmp_path/'a.zip', 'w') as z: z.writestr(odd_entry(create_system=3, external_attr=(stat.S_IFLNK|0o777)<<16), aim)
    no_unpack(tmp_path/'a.zip', 'holds a link')

def central(raw, at, value, size=4)->bytes:
    "A field of the first entry of the central directory set to a value"
    i = raw.index(b'PK\1\2')+at
    return raw[:i]+value.to_bytes(size, 'little')+raw[i+size:]

def test_bomb_declared(tmp_path):
    "More than deflate can pack into the bytes, or more in all than any data set"
    no_unpack(broken(tmp_path/'a.zip', lambda b: central(b, 24, 2**32-2)), 'more than its bytes can hold')

def test_bomb_in_all(tmp_path, monkeypatch):
    monkeypatch.setattr(download, '_most_unpacked', 2000)
    no_unpack(broken(tmp_path/'a.zip', bytes), 'unpacks to more than')

def test_bomb_real(tmp_path):
    "10 MiB of zeros that claim to be 3,000 bytes: no more than those are ever written"
    p = tmp_path/'a.zip'
    p.write_bytes(central(zipped({'zeros':bytes(10*2**20)}), 24, 3000))
    most = []
    real = shutil.copyfileobj
    def watch(src, dst, n): real(src, dst, n); most.append(dst.tell())
    with pytest.MonkeyPatch.context() as m: m.setattr(shutil, 'copyfileobj', watch); no_unpack(p, 'damaged')
    assert max(most, default=0)<=3000

@each('damage', [lambda b: b[:len(b)//2], lambda b: b[:-10], lambda b: b'', lambda b: b'<html>'*50, lambda b: b[:45]+bytes([b[45]^255])+b[46:],
    lambda b: central(b, 16, 1),
    lambda b: central(b, 10, 99, 2), lambda b: central(b, 42, 2**31)], ids=['half','tail','empty','html','data','crc','method','offset'])
def test_damaged(tmp_path, damage): no_unpack(broken(tmp_path/'a.zip', damage), 'damaged')

@each('method', [zipfile.ZIP_BZIP2,zipfile.ZIP_LZMA], ids=['bzip2','lzma'])
def test_damaged_in_other_packings(tmp_path, method):
    raw = zipped({'a':np.random.default_rng(0).bytes(3000)}, method=method)
    i = raw.index(b'PK\1\2')
    (tmp_path/'a.zip').write_bytes(raw[:50]+bytes(o^255 for o in raw[50:i-50])+raw[i-50:])
    no_unpack(tmp_path/'a.zip', 'damaged')

def test_name_that_is_no_text(tmp_path):
    "A name that claims to be UTF-8 and is not"
    no_unpack(broken(tmp_path/'a.zip', lambda b: b.replace('ä'.encode(), b'\xff\xff'), {'ä':b'x'}), 'damaged')

def test_encrypted(tmp_path): no_unpack(broken(tmp_path/'a.zip', lambda b: central(b, 8, 1, 2)), 'encrypted')

@pytest.mark.filterwarnings('ignore:Duplicate name')
@each('pair', [('a','a'),('A/a','A/a'),('A/a','a')], ids=str)
def test_two_of_one_name(tmp_path, pair):
    with zipfile.ZipFile(tmp_path/'a.zip', 'w') as z:
        for i,o in enumerate(pair): z.writestr(o, str(i))
    no_unpack(tmp_path/'a.zip', 'two files of one name')

@each('entries', [{}, {'__MACOSX/._a':b'x'}, {'empty/':b''}], ids=str)
def test_nothing_in_it(tmp_path, entries): no_unpack(broken(tmp_path/'a.zip', bytes, entries), 'a.zip: it holds no file')

def test_good_archives(tmp_path):
    "With its top folder and without, other folders kept; files of the system left out"
    for top in ('','A/'):
        _unpack(broken(tmp_path/'a.zip', bytes, {f'{top}x.nii':b'1', f'{top}deep/y.nii':b'2', '__MACOSX/A/._x.nii':b'3', f'{top}.DS_Store':b'4',
            f'{top}Größe 1.2.nii':b'5'}), tmp_path/'A')
        assert sorted(str(o.relative_to(tmp_path/'A')) for o in (tmp_path/'A').rglob('*') if o.is_file())==['Größe 1.2.nii','deep/y.nii','x.nii']
        assert names(tmp_path)==['A','a.zip']
        shutil.rmtree(tmp_path/'A')

def test_bad_archive_of_a_true_checksum(zenodo, out, capfd, monkeypatch):
    "The known archive itself leads out"
    zenodo.files[scans] = zipped({'../../evil':b'x'})
    monkeypatch.setitem(download.record_sha256, scans, hashlib.sha256(zenodo.files[scans]).hexdigest())
    refused(capfd, out, scans, 'leads out of its folder', 'Do not trust')
    assert not (out/Path(scans).stem).exists() and names(out.parent)==[out.name]

def test_killed_while_unpacking(tmp_path):
    "kill -9 after the first file: the folder is not there, and the next run replaces what was left"
    p = broken(tmp_path/'a.zip', bytes)
    code = ('import os, shutil, sys; from covid3d.download import _unpack; real = shutil.copyfileobj\n'
            'def die(*a):\n    real(*a); a[1].flush(); os.kill(os.getpid(), 9)\nshutil.copyfileobj = die; _unpack(sys.argv[1], sys.argv[2])')
    assert subprocess.run([sys.executable,'-c',code,p,tmp_path/'A']).returncode==-9
    left, = tmp_path.glob('.covid3d-*.tmp')
    assert not (tmp_path/'A').exists() and names(left)==['a.nii.gz']
    (left/'old.nii.gz').write_bytes(b'x')
    with locked(tmp_path): _unpack(p, tmp_path/'A')
    assert names(tmp_path/'A')==['a.nii.gz','b.nii.gz'] and names(tmp_path)==['A','a.zip']

@pytest.mark.fault('K8')
def test_link_in_the_way(zenodo, out, capfd, tmp_path):
    "A link where the download goes is not followed: what it leads to stays as it was"
    out.mkdir(); (tmp_path/'precious').write_text('mine'); folder = out/Path(scans).stem; folder.symlink_to(tmp_path/'nowhere')
    refused(capfd, out, folder, 'is a link')
    assert not (tmp_path/'nowhere').exists() and zenodo.log==[]
    folder.unlink(); (out/scans).symlink_to(tmp_path/'precious')
    assert get(out)==0; complete(out)
    assert (tmp_path/'precious').read_text()=='mine'

def test_two_downloads_at_once(zenodo, out, capfd):
    "The second is told, and the first is left in peace"
    out.mkdir()
    code = 'import sys,time\nfrom covid3d.files import locked\nwith locked(sys.argv[1]): print("in", flush=True); time.sleep(60)'
    p = subprocess.Popen([sys.executable,'-c',code,str(out)], stdout=subprocess.PIPE)
    try: p.stdout.readline(); refused(capfd, out, 'another process')
    finally: p.kill(); p.wait(); p.stdout.close()
    assert get(out)==0; complete(out)

# The disk

def test_too_little_room(zenodo, out, capfd, monkeypatch):
    "Said before the first byte"
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: SimpleNamespace(free=2**23))
    refused(capfd, out, out, 'too little room', scans)
    assert zenodo.log==[] and names(out)==[]

@pytest.mark.skipif(not Path('/dev/full').exists(), reason='needs /dev/full')
@each('where', ['download','unpack'])
def test_disk_full(zenodo, out, capfd, monkeypatch, where):
    "No space left while downloading or unpacking: said so, no folder, and the next run completes"
    real,file = Path.open,io.FileIO
    with monkeypatch.context() as m:
        if where=='download': m.setattr(io, 'FileIO', lambda p, mode: file('/dev/full', mode))
        else: m.setattr(Path, 'open', lambda self,*a,**k: open('/dev/full','wb') if self.name.endswith('.nii.gz') else real(self,*a,**k))
        refused(capfd, out, out, 'cannot be written', 'No space left', 'free space')
    assert not any((out/o).exists() for o in folders)
    assert get(out)==0; complete(out)

def test_out_is_a_file(zenodo, out, capfd):
    out.write_text('x')
    refused(capfd, out, out, 'not a folder')
    assert zenodo.log==[]

# The others

@each('name,words', [('ricord',['CC BY-NC 4.0','nbia-data-retriever --cli MANIFEST.tcia -d {} -v -f','covid3d table {} -o cases.csv']),
    ('mosmed',['CC BY-NC-ND 3.0','mosmed.ai','covid3d table {} -o cases.csv']), ('covid1920',
    ['CC BY-NC-ND 4.0','grand-challenge.org','covid3d table {} -o cases.csv'])])
def test_instructions(zenodo, out, capfd, name, words):
    "Steps for what needs a login, with the folder filled in; no network, no folder"
    assert main(['download',name,'-o',str(out)])==0
    said = capfd.readouterr()
    assert all(o.format(out) in said.out for o in words) and said.err=='' and zenodo.log==[] and not out.exists()
    assert {*instructions}=={'ricord','mosmed','covid1920'}

def test_unknown_data_set(capfd, out):
    assert main(['download','imagenet','-o',str(out)])==2
    err = capfd.readouterr().err
    assert err.count('\n')==1 and 'coronacases' in err and 'imagenet' in err
