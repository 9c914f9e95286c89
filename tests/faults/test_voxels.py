"""Faults of the voxels, D1 to D15: each is made here by the test.

D12 (no lung in the field of view, or lungs cut at the border: the report says null and why, never 0) comes with quantification, which is what measures lungs."""
import gzip, subprocess, sys, time, tracemalloc
import nibabel as nib, numpy as np, pytest
from covid3d.volume import air, max_bytes, open_ct, open_mask, save_mask
from nifti_bytes import Base, chest, hu, nifti, noted, quiet, refused

each = pytest.mark.parametrize

@each('keep', [1, 347, 348, 352, 400, -1])
def test_D1_truncated_nii(plain, keep):
    path = plain.folder/'scan.nii'
    path.write_bytes(plain.raw[:keep])
    refused(path, 'ends too early|too few')

def packed(plain): return bytearray(gzip.compress(plain.raw, mtime=0))

@each('keep', [1, 2, 9, 11, .1, .5, .9, -9, -8, -4, -1])
def test_D2_truncated_gz(plain, keep):
    raw,path = packed(plain),plain.folder/'scan.nii.gz'
    path.write_bytes(raw[:int(keep*len(raw)) if isinstance(keep, float) else keep])
    refused(path, 'damaged or cut short|not gzip')

@each('at', [-8, -5, -4, -1], ids=['crc','crc_end','size','size_end'])
def test_D2_checksum(plain, at):
    raw,path = packed(plain),plain.folder/'scan.nii.gz'
    raw[at] ^= 1; path.write_bytes(raw)
    refused(path, 'gzip stream is damaged')

def test_D2_stored_block(plain):
    "In an uncompressed deflate block a flipped voxel leaves the stream readable: only the checksum tells"
    raw,path = bytearray(gzip.compress(plain.raw, 0)),plain.folder/'scan.nii.gz'
    raw[700] ^= 0x40; path.write_bytes(raw)
    assert nib.load(path).get_fdata().shape==(9,8,7)
    refused(path, 'CRC')

def test_D2_two_members(plain):
    "Parallel packers write several gzip members: valid, and each checksum counts"
    path,cut = plain.folder/'scan.nii.gz',len(plain.raw)//2
    parts = [bytearray(gzip.compress(o)) for o in (plain.raw[:cut],plain.raw[cut:])]
    path.write_bytes(parts[0]+parts[1]); assert np.array_equal(quiet(path).data, plain.canonical)
    parts[1][-8] ^= 1; path.write_bytes(parts[0]+parts[1]); refused(path, 'CRC')

def test_D3_gz_by_name_only(plain):
    path = plain.folder/'scan.nii.gz'
    path.write_bytes(plain.raw)
    refused(path, 'not gzip. Rename it to .nii')

def test_D3_gz_but_not_by_name(plain):
    path = plain.folder/'scan.nii'
    path.write_bytes(packed(plain))
    refused(path, 'content is gzip. Rename it to .nii.gz')

def cost(f)->tuple:
    "Seconds and peak bytes of a call"
    tracemalloc.start(); t = time.time()
    try: f(); return time.time()-t,tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()

def cheap(path, pattern):
    seconds,peak = cost(lambda: refused(path, pattern))
    assert seconds<5 and peak<2**25

def test_D4_bomb(plain):
    "256 MiB of zeros behind a header of a few hundred voxels"
    path = plain.folder/'scan.nii.gz'
    with gzip.open(path, 'wb', compresslevel=9) as f:
        f.write(plain.raw)
        for _ in range(256): f.write(bytes(2**20))
    assert path.stat().st_size<2**19
    cheap(path, 'unpacks to far more')

@each('dim', [(32767,)*3, (2000,1000,500)])
@each('name', ['scan.nii', 'scan.nii.gz'])
def test_D4_absurd_header(base, dim, name): cheap(base.write(name=name, dim=[3,*dim,1,1,1,1]), 'more than the file can hold|ends too early')

def test_D4_huge_file(plain):
    "A sparse file of 8 GiB and a little is refused before it is read"
    path = plain.write()
    with open(path, 'r+b') as f: f.truncate(max_bytes+1)
    cheap(path, 'larger than 8 GiB')

def floats(folder, bad, value):
    "A float scan with its first `bad` voxels set to `value`"
    x = hu((10,10,10)).astype(np.float32); x.ravel()[:bad] = value
    return Base(folder, data=x)

@each('value', [np.nan, np.inf, -np.inf])
@each('bad', [1, 10])
def test_D5_few_nan(tmp_path, value, bad):
    base = floats(tmp_path, bad, value)
    vol = noted(base.write(), f'{bad} voxels that were NaN or infinite became air')
    want = np.where(np.isfinite(base.canonical), base.canonical, hu((10,10,10)).ravel()[bad:].min())
    assert np.array_equal(vol.data, want); assert want.min()<=-990

@each('value', [np.nan, np.inf])
@each('bad', [11, 500, 1000])
def test_D5_many_nan(tmp_path, value, bad): refused(floats(tmp_path, bad, value).write(), 'are NaN or infinite')

@each('dtype', [np.int16, np.uint16, np.float32])
def test_D6_no_rescale(tmp_path, dtype):
    "Stored 0…4095"
    x = np.random.default_rng(0).integers(0, 4096, (9,8,7)).astype(dtype)
    message = refused(Base(tmp_path, data=x).write(), 'not HU')
    assert 'already_windowed=(low, high)' in message and '--already-windowed' in message

grey = np.random.default_rng(0).integers(0, 256, (9,8,7))

@each('dtype', [np.uint8, np.int16, np.float64])
def test_D7_windowed(tmp_path, dtype):
    base = Base(tmp_path, data=grey.astype(dtype))
    refused(base.write(), 'grey levels, not HU')
    vol = open_ct(base.write(), already_windowed=(-1250,250))
    assert np.allclose(vol.data, base.canonical/255*1500-1250, atol=1e-3)

def test_D7_unit_interval(tmp_path): refused(Base(tmp_path, data=(grey/255).astype(np.float32)).write(), 'grey levels')

@each('window', [5, (1,), (100,-100), (0,0), 'ab', (1,2,3), (float('nan'),1)])
def test_D7_bad_window(tmp_path, window):
    refused(Base(tmp_path, data=grey.astype(np.uint8)).write(), 'is not \\(low, high\\)', names='already_windowed', already_windowed=window)

def test_D7_hu_given_as_windowed(plain): refused(plain.write(), 'not grey levels', already_windowed=(-1000,20))

@each('pad', [-1025, -2000, -3024, -8192])
@each('dtype', [np.int16, np.int32, np.float32])
def test_D8_padding(tmp_path, pad, dtype):
    x = hu().astype(dtype); x[:2] = pad
    base = Base(tmp_path, data=x)
    vol = noted(base.write(), f'values below {air} \\(down to {pad}\\) set to {air}')
    assert np.array_equal(vol.data, np.maximum(base.canonical, air))

@each('values', [(0,1500), (0,30), (-150,3000), (-1,1)], ids=['mr','pet','soft_tissue','normalised'])
def test_D9_not_ct(tmp_path, values):
    x = np.random.default_rng(0).uniform(*values, (9,8,7)).astype(np.float32)
    refused(Base(tmp_path, data=x).write(), 'not HU')

def test_D10_float_labels_read(tmp_path):
    "0.9999 from a scaled mask is the label 1"
    x = (hu()>0)*np.float32(.9999)
    base = Base(tmp_path, data=x)
    vol = noted(base.write(), 'rounded to whole numbers', open_mask)
    assert vol.data.dtype==np.uint8 and np.array_equal(vol.data, base.canonical>.5)

@each('slope,inter', [(1,-24), (.5,-600), (2,7)])
def test_D10_mask_is_not_scaled(tmp_path, slope, inter):
    "The mask of a scan that is stored scaled is uint8 with slope 1 and intercept 0"
    ct = open_ct(Base(tmp_path, scaling=(slope,inter)).write())
    mask = np.random.default_rng(1).integers(0, 2, ct.shape)*.9999
    save_mask(mask, ct, tmp_path/'mask.nii.gz')
    img = nib.load(tmp_path/'mask.nii.gz')
    assert img.get_data_dtype()==np.uint8 and (img.dataobj.slope,img.dataobj.inter)==(1,0)
    assert set(np.unique(img.get_fdata()))=={0,1} and np.array_equal(open_mask(tmp_path/'mask.nii.gz', like=ct).data, mask>.5)

@each('dtype', [bool, np.int8, np.int64, np.uint64, np.float32, np.float64])
def test_D11_mask_types(plain, dtype):
    ct = open_ct(plain.write())
    mask = (ct.data>0).astype(dtype)
    save_mask(mask, ct, plain.folder/'mask.nii')
    assert nib.load(plain.folder/'mask.nii').get_data_dtype()==np.uint8
    assert np.array_equal(quiet(plain.folder/'mask.nii', open_mask, like=ct).data, mask)

@each('value', [256, -1, .5, np.nan, 2**40])
def test_D11_no_label(plain, value):
    "A cast would turn 256 and 2**40 into 0, −1 into 255 and 0.5 into 0"
    ct = open_ct(plain.write())
    refused(plain.folder/'mask.nii', 'not whole labels', lambda p: save_mask(np.where(ct.data>0, value, 0), ct, p))
    assert not (plain.folder/'mask.nii').exists()

def test_D11_int64_file(tmp_path):
    "Masks of other tools may be int64"
    base = Base(tmp_path, data=(hu()>0).astype(np.int64))
    assert np.array_equal(quiet(base.write(), open_mask).data, base.canonical)

@each('value', [0, -1000, 40, -1024])
@each('dtype', [np.int16, np.float32])
def test_D13_constant(tmp_path, value, dtype): refused(Base(tmp_path, data=np.full((9,8,7), value, dtype)).write(), f'every voxel is {value}')

measure = '''
import sys, tracemalloc
from covid3d.volume import open_ct
tracemalloc.start(); vol = open_ct(sys.argv[1])
print(tracemalloc.get_traced_memory()[1]/vol.data.nbytes, vol.data.dtype)'''

@each('name', ['scan.nii', 'scan.nii.gz'])
@each('scaling', [(1,0), (1,-1024)], ids=['plain','intercept'])
def test_D14_memory(tmp_path, name, scaling):
    "Opening 40 MB of int16 takes little more than its own size (twice where axes must be reordered); the real 735×512×512 scales alike"
    x = chest((256,256,320))+np.int16(-scaling[1])
    path = Base(tmp_path, data=x, scaling=scaling).write() if name=='scan.nii' else tmp_path/name
    if name!='scan.nii': path.write_bytes(gzip.compress(nifti(x, scaling=scaling), 1))
    times,dtype = subprocess.run([sys.executable, '-c', measure, path], capture_output=True, text=True, check=True).stdout.split()
    assert dtype=='int16' and float(times)<1.3

@each('given', ['scan.nii', 'scan.nii.gz'])
def test_D15_twins(plain, given):
    for name in ('scan.nii','scan.nii.gz'): plain.write(name=name)
    refused(plain.folder/given, 'lies beside it')

def test_D15_other_names(plain):
    "Only the same name is a twin"
    for name in ('scan.nii','scan2.nii.gz','scan.v2.nii.gz'): path = plain.write(name=name); quiet(path)

def test_no_such_file(plain):
    refused(plain.folder/'none.nii', 'no such file'); refused(plain.folder, 'this is a folder')
    (plain.folder/'scan.dcm').write_bytes(b'x'); refused(plain.folder/'scan.dcm', 'does not end in .nii')
