"Download of CoronaCases from a local server that speaks Zenodo's API, with every fault a network or an archive can have"
import hashlib, io, json, re, shutil, stat, subprocess, sys, threading, zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pytest

from covid3d import datasets
from covid3d.cases import read_cases
from covid3d.cli import main
from covid3d.datasets import download, instructions, read_record, unpack
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
        z.log.append((name, self.headers.get('Range')))
        try: self.record(z) if name==z.number else self.file(z, name)
        except (BrokenPipeError,ConnectionResetError): pass  # the client has heard enough
    def record(self, z):
        body = z.record if isinstance(z.record, bytes) else json.dumps(z.record).encode()
        self.head(z.record_status, Content_Type=z.record_type, Content_Length=len(body)); self.wfile.write(body)
    def file(self, z, name):
        body,rng = z.files[name],re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range') or '')
        status = z.status.pop(0) if z.status else 200
        if status!=200: return self.head(status)
        if z.html: self.head(200, Content_Type='text/html; charset=utf-8'); self.wfile.write(b'<html>Please log in</html>'*100); return
        start = int(rng[1]) if rng and z.ranges else 0
        more = dict(Content_Range=f'bytes {start}-{len(body)-1}/{len(body)}') if start else {}
        if z.mode=='chunked':
            self.head(206 if start else 200, Transfer_Encoding='chunked', **more)
            for i in range(start, len(body), 5000): c = body[i:i+5000]; self.wfile.write(b'%x\r\n%s\r\n' % (len(c), c))
            self.wfile.write(b'0\r\n\r\n'); return
        if z.mode=='endless':
            self.head(200, Content_Type='application/octet-stream'); self.wfile.write(body)
            while True: self.wfile.write(bytes(2**16))
        self.head(206 if start else 200, Content_Length=len(body)-start, **more)
        cut = z.cuts.pop(0) if z.cuts else None
        self.wfile.write(body[start:] if cut is None else body[start:start+cut])

class Zenodo(SimpleNamespace):
    "What the server holds, how it misbehaves, and what it was asked"
    def __init__(self, files, url):
        super().__init__(number='7', files=dict(files), log=[], cuts=[], status=[], ranges=True, html=False, mode='', record_status=200,
            record_type='application/json')
        self.url,self.root = f'{url}/api/records/7',url
        self.record = dict(id=7, files=[self.entry(k) for k in files])
    def entry(self, k, **change):
        return dict(key=k, size=len(self.files[k]), checksum='md5:'+hashlib.md5(self.files[k]).hexdigest(), links=dict(self=f'{self.url}/files/{k}'))|change
    def put(self, k, body): self.files[k] = body; self.record['files'] = [self.entry(o) for o in self.files]
    @property
    def asked(self): return [o for o in self.log if o[0]!=self.number]

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
    monkeypatch.setattr(download, '__defaults__', (server.zenodo.url,))
    for k in ('http_proxy','HTTP_PROXY','all_proxy','ALL_PROXY'): monkeypatch.delenv(k, raising=False)
    yield server.zenodo
    server.shutdown(); thread.join(); server.server_close()

@pytest.fixture
def out(tmp_path): return tmp_path/'corona'

def get(out): return main(['download','coronacases','-o',str(out)])
def names(out): return sorted(o.name for o in out.iterdir()) if out.exists() else []

def refused(capfd, out, *words):
    "Exit status 2, and one line that holds `words` and ends with a cure"
    assert get(out)==2
    err = capfd.readouterr().err
    assert err.count('\n')==1 and err.endswith('.\n') and 'Traceback' not in err and all(str(w) in err for w in words), err

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
    assert get(out)==0 and len(zenodo.asked)==3
    assert get(out)==0 and len(zenodo.asked)==3

def test_only_what_is_missing(zenodo, out):
    assert get(out)==0
    shutil.rmtree(out/'Lung_Mask'); zenodo.log.clear()
    assert get(out)==0 and zenodo.asked==[(lungs,None)]; complete(out)

def test_archive_that_is_there_is_used(zenodo, out):
    "An archive fetched by hand counts if its checksum is right, else it is fetched again"
    out.mkdir(); (out/scans).write_bytes(zenodo.files[scans]); (out/lungs).write_bytes(b'not it')
    assert get(out)==0; complete(out)
    assert sorted(zenodo.asked)==[(lesions,None),(lungs,None)]

# A bad line

def test_cut_resumes_in_the_same_run(zenodo, out):
    zenodo.cuts = [1_500_000]
    assert get(out)==0; complete(out)
    (_,first),(again,rng) = zenodo.asked[:2]
    assert first is None and again==scans and 0<int(re.fullmatch(r'bytes=(\d+)-', rng)[1])<=1_500_000

def test_cut_resumes_in_the_next_run(zenodo, out, capfd):
    "All tries cut: the error says how far, what came stays, and the next run asks for the rest only"
    zenodo.cuts = [1_500_000,0,0,0]
    refused(capfd, out, scans, 'was cut after', f'of {len(zenodo.files[scans]):,} bytes', 'run the same command again')
    part = out/f'.{scans}.part'
    have = part.stat().st_size
    assert len(zenodo.asked)==4 and 0<have<=1_500_000 and part.read_bytes()==zenodo.files[scans][:have] and names(out)==[part.name]
    zenodo.log.clear()
    assert get(out)==0 and zenodo.asked[0]==(scans,f'bytes={have}-'); complete(out)

def test_no_ranges(zenodo, out):
    "A server that answers a Range with the whole file: what came before is not put in front of it"
    zenodo.cuts,zenodo.ranges = [1_500_000],False
    assert get(out)==0; complete(out)

def test_chunked(zenodo, out):
    "A body sent in small pieces without its length, as proxies do"
    zenodo.mode = 'chunked'
    assert get(out)==0; complete(out); assert len(zenodo.asked)==3

def test_endless(zenodo, out, capfd):
    "A body longer than the record says ends there; right bytes in front are enough, wrong ones leave nothing that spoils the next run"
    good,zenodo.mode = zenodo.files[scans],'endless'
    zenodo.files[scans] = good[::-1]
    refused(capfd, out)
    zenodo.files[scans],zenodo.mode = good,''
    if get(out): assert get(out)==0  # one run may be needed to find that what has come is wrong
    complete(out)

def test_part_of_another_file(zenodo, out, capfd):
    "A .part that is not the beginning of this file costs one run, not every run"
    out.mkdir(); (out/f'.{scans}.part').write_bytes(bytes(1000))
    refused(capfd, out, scans, 'checksum')
    assert names(out)==[]
    assert get(out)==0; complete(out)

def test_part_longer_than_the_file(zenodo, out):
    out.mkdir(); (out/f'.{lungs}.part').write_bytes(bytes(len(zenodo.files[lungs])+5))
    if get(out): assert get(out)==0
    complete(out)

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
    assert get(out)==0 and len(zenodo.asked)==4; complete(out)

def test_no_server(capfd, out, monkeypatch):
    monkeypatch.setattr(download, '__defaults__', ('http://127.0.0.1:9/api/records/7',))
    refused(capfd, out, '127.0.0.1:9', 'cannot be read', 'Check the network')
    assert not out.exists()

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

@pytest.mark.fault('K8')
@each('kind', ['text/html','application/json'])
def test_web_page_for_the_record(zenodo, out, capfd, kind):
    zenodo.record,zenodo.record_type = b'<html>Welcome to our hotel</html>',kind
    refused(capfd, out, zenodo.url, 'a web page, not the record', 'login')
    assert not out.exists()

@each('status', [404,410,429,500,502])
def test_record_not_to_be_had(zenodo, out, capfd, status):
    zenodo.record_status = status
    refused(capfd, out, zenodo.url, 'the record cannot be read', 'HTTPError')
    assert not out.exists()

@each('record', [b'', b'{"files":', b'null', b'[]', b'5', b'"x"', b'{}', b'{"files":null}', b'{"files":5}', b'{"files":{"a":1}}', b'{"files":[{}]}',
    b'{"files":[[]]}', b'\xff\xfe', b'['*100_000],
    ids=lambda o: ascii(o[:24]))
def test_malformed_record(zenodo, out, capfd, record):
    zenodo.record = record
    refused(capfd, out, zenodo.url)
    assert not out.exists() and zenodo.asked==[]

evil = [dict(key=o) for o in ('../x.zip','a/b.zip','/etc/x.zip','..','.bashrc',5,None)]+[dict(size=o) for o in ('x',None,float('inf'),float('nan'),0,-1,[])]
evil += [dict(checksum=o) for o in ('sha1:'+'0'*40,'md5:'+'0'*31,'md5:'+'g'*32,'0'*32,'',None,5)]
evil += [dict(links=o) for o in ({}, [], None, 'x', dict(self=5), dict(self='https://evil.example/x.zip'), dict(self='file:///etc/passwd'),
    dict(self='//evil.example/x.zip'), dict(self='http://[bad'))]

@each('change', evil, ids=str)
def test_hostile_record(zenodo, out, capfd, change):
    "A record that names a file outside the folder, another server, an impossible size or a checksum that says nothing"
    zenodo.record['files'][0] = zenodo.entry(scans, **change)
    refused(capfd, out, zenodo.url)
    assert names(out)==[] and zenodo.asked==[] and names(out.parent)==[]

def test_record_without_a_file(zenodo, out, capfd):
    zenodo.record['files'].pop()
    refused(capfd, out, zenodo.url, 'the record has no')
    assert not out.exists()

def test_relative_links(zenodo, out):
    for f in zenodo.record['files']: f['links']['self'] = f'7/files/{f["key"]}'
    assert read_record(zenodo.url)[lungs][0]==f'{zenodo.root}/api/records/7/files/{lungs}' and get(out)==0

# The archives

def broken(path, damage, entries={'a.nii.gz':b'one'*500,'b.nii.gz':b'two'*500}):
    "An archive of A, its bytes damaged"
    path.write_bytes(damage(zipped(entries))); return path

def no_unpack(path, match, folder='A'):
    "Refused in one line, and neither the folder nor anything else was written"
    before = names(path.parent)
    with pytest.raises(CTError, match=match) as e: unpack(path, path.parent/folder)
    assert '\n' not in str(e.value) and len(e.value.cure)>5 and names(path.parent)==before

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
    monkeypatch.setattr(datasets, '_most', 2000)
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
        unpack(broken(tmp_path/'a.zip', bytes, {f'{top}x.nii':b'1', f'{top}deep/y.nii':b'2', '__MACOSX/A/._x.nii':b'3', f'{top}.DS_Store':b'4',
            f'{top}Größe 1.2.nii':b'5'}), tmp_path/'A')
        assert sorted(str(o.relative_to(tmp_path/'A')) for o in (tmp_path/'A').rglob('*') if o.is_file())==['Größe 1.2.nii','deep/y.nii','x.nii']
        assert names(tmp_path)==['A','a.zip']
        shutil.rmtree(tmp_path/'A')

def test_bad_archive_of_a_true_checksum(zenodo, out, capfd):
    "The record itself names an archive that leads out"
    zenodo.put(scans, zipped({'../../evil':b'x'}))
    refused(capfd, out, scans, 'leads out of its folder', 'Do not trust')
    assert not (out/Path(scans).stem).exists() and names(out.parent)==[out.name]

def test_killed_while_unpacking(tmp_path):
    "kill -9 after the first file: the folder is not there, and the next run replaces what was left"
    p = broken(tmp_path/'a.zip', bytes)
    code = ('import os, shutil, sys; from covid3d.datasets import unpack; real = shutil.copyfileobj\n'
            'def die(*a):\n    real(*a); a[1].flush(); os.kill(os.getpid(), 9)\nshutil.copyfileobj = die; unpack(sys.argv[1], sys.argv[2])')
    assert subprocess.run([sys.executable,'-c',code,p,tmp_path/'A']).returncode==-9
    left, = tmp_path.glob('.covid3d-*.tmp')
    assert not (tmp_path/'A').exists() and names(left)==['a.nii.gz']
    (left/'old.nii.gz').write_bytes(b'x')
    unpack(p, tmp_path/'A')
    assert names(tmp_path/'A')==['a.nii.gz','b.nii.gz'] and names(tmp_path)==['A','a.zip']

@pytest.mark.fault('K8')
def test_link_in_the_way(zenodo, out, capfd, tmp_path):
    "A link where the download goes is not followed: what it leads to stays as it was"
    out.mkdir(); (tmp_path/'precious').write_text('mine'); (out/f'.{scans}.part').symlink_to(tmp_path/'precious')
    refused(capfd, out, f'.{scans}.part', 'is a link')
    assert (tmp_path/'precious').read_text()=='mine'
    (out/f'.{scans}.part').unlink(); (out/scans).symlink_to(tmp_path/'precious')
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
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: SimpleNamespace(free=2*len(zenodo.files[scans])))
    refused(capfd, out, out, 'too little room', scans)
    assert zenodo.asked==[] and names(out)==[]

@pytest.mark.skipif(not Path('/dev/full').exists(), reason='needs /dev/full')
@each('end', ['.part','.nii.gz'])
def test_disk_full(zenodo, out, capfd, monkeypatch, end):
    "No space left while downloading or unpacking: said so, no folder, and the next run completes"
    real = Path.open
    with monkeypatch.context() as m:
        m.setattr(Path, 'open', lambda self,*a,**k: open('/dev/full','wb') if self.name.endswith(end) else real(self,*a,**k))
        refused(capfd, out, out, 'cannot be written', 'No space left', 'free space')
    assert not any((out/o).exists() for o in folders)
    assert get(out)==0; complete(out)

def test_out_is_a_file(zenodo, out, capfd):
    out.write_text('x')
    refused(capfd, out, out, 'no folder')
    assert zenodo.log==[]

# The others

@each('name,words', [('ricord',['CC BY-NC 4.0','nbia-data-retriever --cli MANIFEST.tcia -d {} -v -f','covid3d cases ricord {} -o cases.csv']),
    ('mosmed',['CC BY-NC-ND 3.0','mosmed.ai','covid3d cases mosmed {} -o cases.csv']), ('covid1920',
    ['CC BY-NC-ND 4.0','grand-challenge.org','covid3d cases covid1920 {} -o cases.csv'])])
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
