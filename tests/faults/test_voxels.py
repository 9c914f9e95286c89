"""Faults of the voxels, D1 to D15: each is made here by the test.

D12 (no lung in the field of view, or lungs cut at the border: the report says null and why, never 0) comes with quantification, which is what measures lungs."""
import gzip, os, struct, subprocess, sys, time, tracemalloc, zlib
import nibabel as nib, numpy as np, pytest
from covid3d import errors, nifti as nifti_module, volume
from covid3d.volume import air, canonical_affine, max_bytes, open_ct, open_mask, save_mask, save_volume
from nifti_bytes import Base, chest, hu, nifti, noted, quiet, refused

each = pytest.mark.parametrize

@pytest.mark.fault('D1')
@each('keep', [1, 347, 348, 352, 400, -1])
def test_D1_truncated_nii(plain, keep):
    path = plain.folder/'scan.nii'
    path.write_bytes(plain.raw[:keep])
    refused(path, 'ends too early|too few')

def packed(plain): return bytearray(gzip.compress(plain.raw, mtime=0))

@pytest.mark.fault('D2')
@each('keep', [1, 2, 9, 11, .1, .5, .9, -9, -8, -4, -1])
def test_D2_truncated_gz(plain, keep):
    raw,path = packed(plain),plain.folder/'scan.nii.gz'
    path.write_bytes(raw[:int(keep*len(raw)) if isinstance(keep, float) else keep])
    refused(path, 'damaged or cut short|not gzip')

@pytest.mark.fault('D2')
@each('at', [-8, -5, -4, -1], ids=['crc','crc_end','size','size_end'])
def test_D2_checksum(plain, at):
    raw,path = packed(plain),plain.folder/'scan.nii.gz'
    raw[at] ^= 1; path.write_bytes(raw)
    refused(path, 'gzip stream is damaged')

@pytest.mark.fault('D2')
def test_D2_stored_block(plain):
    "In an uncompressed deflate block a flipped voxel leaves the stream readable: only the checksum tells"
    raw,path = bytearray(gzip.compress(plain.raw, 0)),plain.folder/'scan.nii.gz'
    raw[700] ^= 0x40; path.write_bytes(raw)
    assert nib.load(path).get_fdata().shape==(9,8,7)
    refused(path, 'CRC')

@pytest.mark.fault('D2')
def test_D2_two_members(plain):
    "Parallel packers write several gzip members: valid, and each checksum counts"
    path,cut = plain.folder/'scan.nii.gz',len(plain.raw)//2
    parts = [bytearray(gzip.compress(o)) for o in (plain.raw[:cut],plain.raw[cut:])]
    path.write_bytes(parts[0]+parts[1]); assert np.array_equal(quiet(path).data, plain.canonical)
    parts[1][-8] ^= 1; path.write_bytes(parts[0]+parts[1]); refused(path, 'CRC')

@pytest.mark.fault('D3')
def test_D3_gz_by_name_only(plain):
    path = plain.folder/'scan.nii.gz'
    path.write_bytes(plain.raw)
    refused(path, 'not gzip. Rename it to .nii')

@pytest.mark.fault('D3')
def test_D3_gz_but_not_by_name(plain):
    path = plain.folder/'scan.nii'
    path.write_bytes(packed(plain))
    refused(path, 'content is gzip. Rename it to .nii.gz')

def cost(f)->tuple:
    "Seconds and peak bytes of a call"
    tracemalloc.start(); t = time.time()
    try: f(); return time.time()-t,tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()

def cheap(path, pattern, opener=open_ct):
    seconds,peak = cost(lambda: refused(path, pattern, opener))
    assert seconds<5 and peak<2**25

@pytest.mark.fault('D4')
def test_D4_bomb(plain):
    "256 MiB of zeros behind a header of a few hundred voxels"
    path = plain.folder/'scan.nii.gz'
    with gzip.open(path, 'wb', compresslevel=9) as f:
        f.write(plain.raw)
        for _ in range(256): f.write(bytes(2**20))
    assert path.stat().st_size<2**19
    cheap(path, 'unpacks to far more')

@pytest.mark.fault('D4')
@each('dim', [(32767,)*3, (2000,1000,500)])
@each('name', ['scan.nii', 'scan.nii.gz'])
def test_D4_absurd_header(base, dim, name): cheap(base.write(name=name, dim=[3,*dim,1,1,1,1]), 'more than the file can hold|ends too early')

@pytest.mark.fault('D4')
def test_D4_huge_file(plain):
    "A sparse file of 8 GiB and a little is refused before it is read"
    path = plain.write()
    with open(path, 'r+b') as f: f.truncate(max_bytes+1)
    cheap(path, 'larger than 8 GiB')

def header(shape, code, bits):
    raw = bytearray(nifti(hu())[:352])
    raw[40:56],raw[70:74] = struct.pack('<8h', 3, *shape, 1, 1, 1, 1),struct.pack('<2h', code, bits)
    return bytes(raw)

def hollow(path, shape, code=4, bits=16):
    "A valid header, and voxels that are a hole: some kilobytes on the disk"
    path.write_bytes(header(shape, code, bits)); os.truncate(path, 352+int(np.prod(shape))*bits//8)
    return path

@pytest.mark.fault('D4')
@pytest.mark.promise('silent')
@pytest.mark.skipif(not hasattr(os, 'SEEK_DATA'), reason='this system does not tell holes from data')
@each('opener', [open_ct, open_mask])
@each('code,bits', [(4,16), (64,64)])
def test_D4_sparse_file(tmp_path, opener, code, bits):
    "A file of gigabytes of which some kilobytes are stored is refused before memory is taken"
    path = hollow(tmp_path/'scan.nii', (2048,1024,2048*12//bits), code, bits)
    assert path.stat().st_size>2.5*2**30
    cheap(path, 'sparse file', opener)

@pytest.mark.fault('D4')
def test_D4_holes_behind_a_stream(tmp_path):
    "A hole behind the gzip stream does not make a bomb look large enough"
    path = tmp_path/'scan.nii.gz'
    zeros_gz(path, header((2048,1024,1024), 2, 8), 2**31); os.truncate(path, 2**28)
    cheap(path, 'times its packed size')

@pytest.mark.fault('D4')
def test_D4_a_sparse_copy_of_a_scan_opens(tmp_path):
    "`cp --sparse=always` makes holes of the zeros of a mask; such a copy opens"
    x = np.zeros((256,256,64), np.uint8); x[10:20,10:20,10:20] = 1
    path = tmp_path/'mask.nii'; path.write_bytes(nifti(x)[:352]); os.truncate(path, 352+x.nbytes)
    with path.open('r+b') as f: f.seek(352); f.write(x.tobytes('F')[:256*256*20])
    assert open_mask(path).data.sum()==1000

@pytest.mark.fault('D14')
@pytest.mark.promise('silent')
@each('name', ['scan.nii', 'scan.nii.gz'])
def test_D14_more_than_is_left(tmp_path, monkeypatch, name):
    "A scan that needs more memory than the machine has left is refused before it is read, with both numbers"
    path,shape = tmp_path/name,(512,512,300)
    if name.endswith('gz'): zeros_gz(path, header(shape, 16, 32), 300*2**20)
    else: hollow(path, shape, 16, 32)
    monkeypatch.setattr(errors, 'memory_left', lambda: 2**28)
    cheap(path, r'needs 600 MiB of memory, and 256 MiB are left')

def group(folder, **files):
    "A control group"
    folder.mkdir(parents=True)
    for k,v in files.items(): (folder/k.replace('_in_', '§').replace('__', '.').replace('§', '_in_')).write_text(v)

@pytest.mark.fault('D14')
@each('limit,want', [('max', float('inf')), ('1000', 700)])
def test_D14_limit_of_a_container(tmp_path, limit, want):
    "What is left in a container is its limit less its use, and its cached files count as left"
    group(tmp_path/'v2', memory__max=limit, memory__current='500', memory__stat='anon 300\ninactive_file 150\nactive_file 50\n')
    assert errors._left_in(tmp_path/'v2')==want and errors._left_in(tmp_path/'none')==float('inf')
    group(tmp_path/'v1', memory__limit_in_bytes='1000', memory__usage_in_bytes='900', memory__stat='total_inactive_file 30\ntotal_active_file 20\n')
    assert errors._left_in(tmp_path/'v1')==150 and 0<volume.memory_left()

def zeros_gz(path, header, n):
    "A gzip of `header` and `n` zeros, packed a thousand to one, made in no time: one MiB of zeros, repeated as a full-flushed block"
    z = zlib.compressobj(9, zlib.DEFLATED, -15)
    head = z.compress(header)+z.flush(zlib.Z_FULL_FLUSH)
    block,crc = z.compress(bytes(2**20))+z.flush(zlib.Z_FULL_FLUSH),zlib.crc32(header)
    with path.open('wb') as f:
        f.write(b'\x1f\x8b\x08'+bytes(7)+head)
        for _ in range(n>>20): f.write(block); crc = zlib.crc32(bytes(2**20), crc)
        f.write(z.flush(zlib.Z_FINISH)+struct.pack('<II', crc, (len(header)+n)%2**32))

@pytest.mark.fault('D4')
@pytest.mark.promise('silent')
@each('opener', [open_ct, open_mask])
@each('dtype,code,bits', [(np.uint8,2,8), (np.float64,64,64)])
def test_D4_header_that_fits_the_stream(tmp_path, opener, dtype, code, bits):
    "Two megabytes that are, and say they are, two gigabytes of zeros: refused before memory is taken"
    base,path = Base(tmp_path, data=hu().astype(dtype)),tmp_path/'scan.nii.gz'
    size = bits//8
    raw = bytearray(base.raw[:352]); raw[40:56] = struct.pack('<8h', 3, 2048, 1024, 1024//size, 1, 1, 1, 1)
    zeros_gz(path, bytes(raw), 2**31)
    assert path.stat().st_size<2**22
    cheap(path, 'times its packed size', opener)

@pytest.mark.fault('D4')
@each('name', ['scan.nii', 'scan.nii.gz'])
def test_D4_offset_far_out(plain, name):
    "The voxels start gigabytes behind the header"
    cheap(plain.write(name=name, vox_offset=2**30), 'more than the file|ends too early')

@pytest.mark.fault('D4')
def test_D4_large_scans_and_empty_masks_open(tmp_path):
    "The limit is far from real files: a mask packs 500 to 1"
    mask = np.zeros((300,300,400), np.uint8); mask[10:20,10:20,10:20] = 1
    path = tmp_path/'mask.nii.gz'; path.write_bytes(gzip.compress(nifti(mask), 9))
    assert open_mask(path).data.sum()==1000 and mask.nbytes>300*path.stat().st_size

@pytest.mark.fault('D14')
@each('opener', [open_ct, open_mask])
def test_D14_out_of_memory(plain, opener, monkeypatch):
    "A scan that does not fit in memory is an error that names it"
    path = plain.write()
    for module,name in ((nifti_module,'_stored'), (volume,'_in_order')):
        with monkeypatch.context() as m:
            m.setattr(module, name, lambda *a: (_ for _ in ()).throw(MemoryError()))
            refused(path, 'not enough memory', opener)

limited = '''
import resource, sys
from covid3d.volume import CTError, open_ct
for path in sys.argv[:0:-1]:  # the small one first: libraries take memory of their own at the first call
    try: open_ct(path); break
    except CTError as e: print(e)
now = int(open('/proc/self/statm').read().split()[0])*resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now+2**24,)*2)
try: open_ct(sys.argv[1])
except CTError as e: print(e)'''

@pytest.mark.fault('D14')
@pytest.mark.skipif(not os.path.exists('/proc/self/statm'), reason='limits the memory as Linux does')
@each('name', ['scan.nii', 'scan.nii.gz'])
def test_D14_ulimit(tmp_path, name):
    path = tmp_path/name
    raw = nifti(np.zeros((256,256,320), np.int16)); path.write_bytes(gzip.compress(raw, 1) if name.endswith('gz') else raw)
    said = subprocess.run([sys.executable, '-c', limited, path, Base(tmp_path).write(name='small.nii'), tmp_path/'none.nii'], capture_output=True, text=True)
    assert said.returncode==0 and f'\n{path}: there is not enough memory' in said.stdout, said

def floats(folder, bad, value):
    "A float scan with its first `bad` voxels set to `value`"
    x = hu((10,10,10)).astype(np.float32); x.ravel()[:bad] = value
    return Base(folder, data=x)

@pytest.mark.fault('D5')
@each('value', [np.nan, np.inf, -np.inf])
@each('bad', [1, 10])
def test_D5_few_nan(tmp_path, value, bad):
    base = floats(tmp_path, bad, value)
    vol = noted(base.write(), f'{bad} voxels that were NaN or infinite became air')
    want = np.where(np.isfinite(base.canonical), base.canonical, hu((10,10,10)).ravel()[bad:].min())
    assert np.array_equal(vol.data, want); assert want.min()<=-990

@pytest.mark.fault('D5')
@each('value', [np.nan, np.inf])
@each('bad', [11, 500, 1000])
def test_D5_many_nan(tmp_path, value, bad): refused(floats(tmp_path, bad, value).write(), 'are NaN or infinite')

@pytest.mark.fault('D6')
@each('dtype', [np.int16, np.uint16, np.float32])
def test_D6_no_rescale(tmp_path, dtype):
    "Stored 0…4095"
    x = np.random.default_rng(0).integers(0, 4096, (9,8,7)).astype(dtype)
    message = refused(Base(tmp_path, data=x).write(), 'not HU')
    assert 'already_windowed=(low, high)' in message and '--already-windowed' in message

grey = np.random.default_rng(0).integers(0, 256, (9,8,7))

@pytest.mark.fault('D7')
@each('dtype', [np.uint8, np.int16, np.float64])
def test_D7_windowed(tmp_path, dtype):
    base = Base(tmp_path, data=grey.astype(dtype))
    refused(base.write(), 'gray levels, not HU')
    vol = open_ct(base.write(), already_windowed=(-1250,250))
    assert np.allclose(vol.data, base.canonical/255*1500-1250, atol=1e-3)

@pytest.mark.fault('D7')
def test_D7_unit_interval(tmp_path): refused(Base(tmp_path, data=(grey/255).astype(np.float32)).write(), 'gray levels')

@pytest.mark.fault('D7')
@each('window', [5, (1,), (100,-100), (0,0), 'ab', (1,2,3), (float('nan'),1)])
def test_D7_bad_window(tmp_path, window):
    refused(Base(tmp_path, data=grey.astype(np.uint8)).write(), 'is not \\(low, high\\)', names='already_windowed', already_windowed=window)

@pytest.mark.fault('D7')
def test_D7_hu_given_as_windowed(plain): refused(plain.write(), 'not gray levels', already_windowed=(-1000,20))

@pytest.mark.fault('D8')
@each('pad', [-1025, -2000, -3024, -8192])
@each('dtype', [np.int16, np.int32, np.float32])
def test_D8_padding(tmp_path, pad, dtype):
    x = hu().astype(dtype); x[:2] = pad
    base = Base(tmp_path, data=x)
    vol = noted(base.write(), f'values below {air} \\(down to {pad}\\) set to {air}')
    assert np.array_equal(vol.data, np.maximum(base.canonical, air))

@pytest.mark.fault('D9')
@each('values', [(0,1500), (0,30), (-150,3000), (-1,1)], ids=['mr','pet','soft_tissue','normalised'])
def test_D9_not_ct(tmp_path, values):
    x = np.random.default_rng(0).uniform(*values, (9,8,7)).astype(np.float32)
    refused(Base(tmp_path, data=x).write(), 'not HU')

@pytest.mark.fault('D10')
def test_D10_float_labels_read(tmp_path):
    "0.9999 from a scaled mask is the label 1"
    x = (hu()>0)*np.float32(.9999)
    base = Base(tmp_path, data=x)
    vol = noted(base.write(), 'rounded to whole numbers', open_mask)
    assert vol.data.dtype==np.uint8 and np.array_equal(vol.data, base.canonical>.5)

@pytest.mark.fault('D10')
@each('slope,inter', [(1,-24), (.5,-600), (2,7)])
def test_D10_mask_is_not_scaled(tmp_path, slope, inter):
    "The mask of a scan that is stored scaled is uint8 with slope 1 and intercept 0"
    ct = open_ct(Base(tmp_path, scaling=(slope,inter)).write())
    mask = np.random.default_rng(1).integers(0, 2, ct.shape)*.9999
    save_mask(mask, ct, tmp_path/'mask.nii.gz')
    img = nib.load(tmp_path/'mask.nii.gz')
    assert img.get_data_dtype()==np.uint8 and (img.dataobj.slope,img.dataobj.inter)==(1,0)
    assert set(np.unique(img.get_fdata()))=={0,1} and np.array_equal(open_mask(tmp_path/'mask.nii.gz', like=ct).data, mask>.5)

@pytest.mark.fault('D11')
@each('dtype', [bool, np.int8, np.int64, np.uint64, np.float32, np.float64])
def test_D11_mask_types(plain, dtype):
    ct = open_ct(plain.write())
    mask = (ct.data>0).astype(dtype)
    save_mask(mask, ct, plain.folder/'mask.nii')
    assert nib.load(plain.folder/'mask.nii').get_data_dtype()==np.uint8
    assert np.array_equal(quiet(plain.folder/'mask.nii', open_mask, like=ct).data, mask)

@pytest.mark.fault('D11')
@each('value', [256, -1, .5, np.nan, 2**40])
def test_D11_no_label(plain, value):
    "A cast would turn 256 and 2**40 into 0, −1 into 255 and 0.5 into 0"
    ct = open_ct(plain.write())
    refused(plain.folder/'mask.nii', 'not whole labels', lambda p: save_mask(np.where(ct.data>0, value, 0), ct, p))
    assert not (plain.folder/'mask.nii').exists()

@pytest.mark.fault('D11')
def test_D11_int64_file(tmp_path):
    "Masks of other tools may be int64"
    base = Base(tmp_path, data=(hu()>0).astype(np.int64))
    assert np.array_equal(quiet(base.write(), open_mask).data, base.canonical)

@pytest.mark.fault('D13')
@each('value', [0, -1000, 40, -1024])
@each('dtype', [np.int16, np.float32])
def test_D13_constant(tmp_path, value, dtype): refused(Base(tmp_path, data=np.full((9,8,7), value, dtype)).write(), f'every voxel is {value}')

measure = '''
import sys, tracemalloc
from covid3d.volume import open_ct
tracemalloc.start(); vol = open_ct(sys.argv[1])
print(tracemalloc.get_traced_memory()[1]/vol.data.nbytes, vol.data.dtype)'''

@pytest.mark.fault('D14')
@each('name', ['scan.nii', 'scan.nii.gz'])
@each('scaling', [(1,0), (1,-1024)], ids=['plain','intercept'])
def test_D14_memory(tmp_path, name, scaling):
    "Opening 40 MB of int16 takes little more than its own size (twice where axes must be reordered); the real 735×512×512 scales alike"
    x = np.tile(chest((64,64,40)), (4,4,8))+np.int16(-scaling[1])
    path = Base(tmp_path, data=x, scaling=scaling).write() if name=='scan.nii' else tmp_path/name
    if name!='scan.nii': path.write_bytes(gzip.compress(nifti(x, scaling=scaling), 1))
    times,dtype = subprocess.run([sys.executable, '-c', measure, path], capture_output=True, text=True, check=True).stdout.split()
    assert dtype=='int16' and float(times)<1.3

@pytest.mark.fault('D15')
@each('given', ['scan.nii', 'scan.nii.gz'])
def test_D15_twins(plain, given):
    for name in ('scan.nii','scan.nii.gz'): plain.write(name=name)
    refused(plain.folder/given, 'is beside it')

@pytest.mark.fault('D15')
def test_D15_other_names(plain):
    "Only the same name is a twin"
    for name in ('scan.nii','scan2.nii.gz','scan.v2.nii.gz'): path = plain.write(name=name); quiet(path)

@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='no pipes here')
@each('opener', [open_ct, open_mask])
@each('name', ['scan.nii', 'scan.nii.gz'])
@each('aim', ['/dev/null', '/dev/zero', 'fifo'])
def test_pipes_and_devices(tmp_path, opener, name, aim):
    "Never opened, so neither hang nor endless reading"
    if aim=='fifo': os.mkfifo(tmp_path/name)
    else: (tmp_path/name).symlink_to(aim)
    refused(tmp_path/name, 'a pipe or a device', opener)

@each('name', ['a\nb.nii', 'a\x1b[31mb.nii', 'a\u202eb.nii', 'x'*300+'.nii', 'x'*5000+'.nii.gz', 'nul\0.nii', '\udcff.nii'], ids=range(7))
def test_odd_names(tmp_path, name):
    "One line without control characters, whatever the name"
    message = refused(tmp_path/name, 'no such file|cannot be read', names=tmp_path)
    assert message.isprintable() and message.encode('utf8')

@each('mm', [1e-300, 1e-4, 1e4, float('nan'), 0])
def test_no_volume_of_absurd_voxels_is_written(tmp_path, mm):
    vol = volume.Volume(hu(), canonical_affine((mm,1,1)))
    refused(tmp_path/'scan.nii', 'singular|are not a CT', lambda p: save_volume(vol, p))

def test_no_such_file(plain):
    refused(plain.folder/'none.nii', 'no such file'); refused(plain.folder, 'this is a folder.*use open_scan')
    (plain.folder/'scan.dcm').write_bytes(b'x'); refused(plain.folder/'scan.dcm', 'does not end in .nii')
