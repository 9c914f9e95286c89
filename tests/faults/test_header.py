"Faults of the NIfTI header, H1 to H22: each is made here byte by byte, in NIfTI-1 and NIfTI-2 and both byte orders"
import nibabel as nib, numpy as np, pytest
from covid3d.volume import open_ct, open_mask, save_mask
from nifti_bytes import Base, nifti, noted, patch, peek, quiet, refused, sizes, upright

each = pytest.mark.parametrize

def same(vol, base): assert np.array_equal(vol.data, base.canonical)
def same_affine(vol, path): assert np.allclose(vol.affine@[0,0,0,1], nib.load(path).affine@[0,7,0,1], atol=1e-4)

def mask_fits(vol, path, folder):
    "A mask written for `vol` lies on the grid that nibabel sees in the file"
    save_mask((vol.data>0).astype(np.uint8), vol, folder/'out.nii.gz')
    out,src = nib.load(folder/'out.nii.gz'),nib.load(path)
    assert out.shape==src.shape and np.array_equal(out.affine, src.affine)

def test_base_is_valid(base):
    "What the tests below break opens without a note, so a refusal is for the fault that was made"
    same(quiet(base.write()), base); same(quiet(base.write(name='packed.nii.gz')), base)

@pytest.mark.fault('H1')
@each('size', [0, -1, 347, 349, 541, 2**31-1])
def test_H1_sizeof_hdr(base, size): refused(base.write(sizeof_hdr=size), 'header size is neither 348 nor 540')

@pytest.mark.fault('H2')
def test_H2_big_endian(base):
    path = base.write()
    assert base.raw[:4]==sizes[base.version].to_bytes(4, 'little' if base.order=='<' else 'big')
    vol = quiet(path)
    assert vol.data.dtype==np.int16 and vol.data.dtype.isnative
    same(vol, base); assert np.array_equal(vol.data.transpose(2,1,0)[:,::-1], nib.load(path).get_fdata())

@pytest.mark.fault('H3')
@each('magic', [b'\0\0\0\0', b'abc\0', b'n+', b'n+3', b'n+1X', b'n+2X', b'N+1\0', b'N+2\0'])
def test_H3_bad_magic(base, magic): refused(base.write(magic=magic), 'NIfTI magic is')

@pytest.mark.fault('H3')
@each('content', [b'', b'x', b'<!DOCTYPE html><html>'+b' '*900, b'\x89PNG\r\n\x1a\n'+bytes(900), bytes(5000), b'DICM'*400])
def test_H3_no_nifti(plain, content):
    path = plain.folder/'scan.nii'
    path.write_bytes(content)
    refused(path, 'empty|too few|not a NIfTI file')

@pytest.mark.fault('H3')
def test_H3_header_of_a_pair(base): refused(base.write(magic=b'ni1' if base.version==1 else b'ni2'), 'hdr/.img pair')

@pytest.mark.fault('H3')
@each('eol', [b'\n\x1a\n\0', b'\r\n\x1a\r', b'\n\n\x1a\n'])
@each('order', '<>')
def test_H3_text_transfer(tmp_path, order, eol):
    "NIfTI-2 carries line ends so that a transfer as text shows; all zero is allowed"
    base = Base(tmp_path, 2, order)
    refused(base.write(eol_check=eol), 'line ends')
    same(quiet(base.write(eol_check=bytes(4))), base)

@pytest.mark.fault('H4')
@each('offset', [-16, 0, 16, 348, 351])
def test_H4_offset_in_header(base, offset): refused(base.write(vox_offset=offset), 'inside the header')

@pytest.mark.fault('H4')
@each('offset', [float('nan'), float('inf'), -float('inf'), 1e30])
def test_H4_offset_no_number(plain, offset): refused(plain.write(vox_offset=offset), 'inside the header|more than the file')

@pytest.mark.fault('H4')
@each('extra', [8, 17])
def test_H4_offset_not_multiple_of_16(base, extra):
    first = int(peek(base.raw, base.version, base.order, 'vox_offset')[0])
    raw = base.raw[:first]+b'\x55'*extra+base.raw[first:]
    same(noted(base.write(raw, vox_offset=first+extra), 'not a multiple of 16'), base)

@pytest.mark.fault('H5')
@each('code', [-1, 0, 1, 3, 32, 128, 1536, 1792, 2048, 2304, 9999], ids='negative unknown binary undefined complex64 rgb24 float128 complex128 complex256 rgba32 9999'.split())
def test_H5_datatype(base, code): refused(base.write(datatype=code), f'type {code} cannot be CT')

@pytest.mark.fault('H6')
@each('bits', [0, 8, 32, -1])
def test_H6_bitpix(base, bits): same(noted(base.write(bitpix=bits), f'bitpix was {bits}, set to 16'), base)

@pytest.mark.fault('H7')
@each('axis', [1,2,3])
@each('value', [0, float('nan'), float('inf')])
def test_H7_zero_spacing(base, axis, value): refused(base.write(pixdim={axis:value}), 'the spacing is')

@pytest.mark.fault('H8')
@each('axis', [1,2,3])
@each('sform', [0,1])
def test_H8_negative_spacing(base, axis, sform):
    raw = patch(base.raw, base.version, base.order, sform_code=sform)
    vol = noted(base.write(raw, pixdim={axis:-(.7,.8,2.5)[axis-1]}), 'negative spacing')
    assert np.allclose(vol.spacing, (2.5,.8,.7)); same(vol, base)

@pytest.mark.fault('H9')
@each('qfac', [0, .5, -2, 3, float('nan')])
def test_H9_qfac(base, qfac):
    path = base.write(sform_code=0, pixdim={0:qfac})
    vol = noted(path, 'qfac was')
    assert np.linalg.det(nib.load(path).affine)>0  # the qfac that is repaired is 1: no mirror
    mask_fits(vol, path, base.folder)

@pytest.mark.fault('H10')
@each('code', [-1, 6, 99, 32767])
def test_H10_qform_code(base, code): same(noted(base.write(qform_code=code), f'qform_code was {code}, set to 0'), base)

@pytest.mark.fault('H10')
@each('code', [-1, 6, 99, 32767])
def test_H10_sform_code(base, code):
    path = base.write(sform_code=code)
    vol = noted(path, f'sform_code was {code}, set to 0')
    same(vol, base); same_affine(vol, path)  # the qform is taken

@pytest.mark.fault('H10')
def test_H10_both_codes(base): noted(base.write(sform_code=77, qform_code=77), 'left and right are not known')

@pytest.mark.fault('H11')
def test_H11_no_orientation(base):
    path = base.write(sform_code=0, qform_code=0)
    vol = noted(path, 'left and right are not known')
    same(vol, base); same_affine(vol, path); mask_fits(vol, path, base.folder)

def shifted(base, mm):
    "The qform moved along x"
    x,y,z = peek(base.raw, base.version, base.order, 'qoffset')
    return base.write(qoffset=(x+mm,y,z))

@pytest.mark.fault('H12')
@each('mm', [.36, -1, 10])
def test_H12_sform_and_qform_disagree(base, mm): refused(shifted(base, mm), 'sform and qform disagree')

@pytest.mark.fault('H12')
@each('mm', [0, .01, .34])
def test_H12_sform_and_qform_agree(base, mm):
    vol = quiet(shifted(base, mm))
    assert np.allclose(vol.affine[:3,3], (upright@[0,7,0,1])[:3], atol=1e-4)  # the sform is taken

@pytest.mark.fault('H12')
def test_H12_corner_not_origin(base):
    "The origins agree; the far corner is a voxel away"
    refused(base.write(pixdim={1:.8}), 'sform and qform disagree')

@pytest.mark.fault('H12')
def test_H12_mirrored(base): refused(base.write(pixdim={0:-peek(base.raw, base.version, base.order, 'pixdim')[0]}), 'sform and qform disagree')

@pytest.mark.fault('H13')
@each('shear', [.01, .2, -1])
def test_H13_sheared(base, shear):
    affine = upright.copy(); affine[1,2] = shear
    path = base.write(srow=affine[:3].ravel().tolist(), qform_code=0)
    vol = noted(path, 'sheared axes')
    assert np.isclose(vol.ml_per_voxel, .7*.8*2.5/1000)
    same(vol, base); mask_fits(vol, path, base.folder)

@each('rows', [[0]*12, [1,0,0,0, 2,0,0,0, 0,0,1,0], [1,1,0,0, 1,1,0,0, 0,0,1,0], [1,1,0,0, 1,1+1e-7,0,0, 0,0,1,0], [float('nan')]*12, [float('inf'),0,0,0, 0,1,0,0, 0,0,1,0],
    [1,0,0,float('nan'), 0,1,0,0, 0,0,1,0], [1,0,0,0, 0,1,0,float('-inf'), 0,0,1,0]], ids='zero axis_lost parallel almost_parallel nan inf nan_origin inf_origin'.split())
@pytest.mark.fault('H14')
def test_H14_singular(base, rows): refused(base.write(srow=rows, qform_code=0), 'singular or not a number')

@pytest.mark.fault('H14')
@each('size', [1e-5, 1e5, 1e30])
def test_H14_absurd_voxel(base, size): refused(base.write(srow=[size,0,0,0, 0,1,0,0, 0,0,1,0], qform_code=0), 'are not a CT')

@pytest.mark.fault('H14')
@pytest.mark.filterwarnings('error')
def test_H14_overflow(tmp_path):
    "NIfTI-2's doubles can hold numbers whose square is infinite"
    base = Base(tmp_path, 2)
    refused(base.write(srow=[1e200,0,0,0, 0,1e200,0,0, 0,0,1e200,0], qform_code=0), 'singular|are not a CT')

@pytest.mark.fault('H15')
@each('quat', [(1,1,0), (0,0,1.01), (-3,0,0), (float('nan'),0,0)])
def test_H15_quaternion(base, quat): refused(base.write(quatern=quat), 'quaternion is longer than 1')

@pytest.mark.fault('H15')
@each('over', [0, 1e-7, 1e-6, 4e-6])
def test_H15_quaternion_float_noise(base, over):
    "A length of 1 up to noise is a rotation by 180°; nibabel alone raises ValueError on some of these"
    vol = quiet(base.write(sform_code=0, quatern=(0,1+over,0)))
    assert np.allclose(abs(vol.affine[:3,:3]), abs(upright[:3,:3])[:,::-1], atol=1e-6)
    save_mask((vol.data>0).astype(np.uint8), vol, base.folder/'out.nii')
    assert np.array_equal(open_mask(base.folder/'out.nii', like=vol).data, vol.data>0)

@pytest.mark.fault('H16')
@each('slope,inter', [(0,0), (0,-1024), (float('nan'),float('nan')), (float('nan'),5), (0,float('nan')), (float('inf'),0)])
def test_H16_unscaled(base, slope, inter):
    path = base.write(scl_slope=slope, scl_inter=inter)
    vol = quiet(path)
    same(vol, base); assert vol.data.dtype==np.int16; mask_fits(vol, path, base.folder)

@pytest.mark.fault('H17')
@each('inter', [float('nan'), float('inf'), -float('inf')])
def test_H17_intercept(base, inter): refused(base.write(scl_slope=1, scl_inter=inter), 'rescale intercept')

@pytest.mark.fault('H17')
@each('slope,inter', [(1e6,0), (1e30,0), (1,3e9)])
def test_H17_scaling_overflow(base, slope, inter):
    "A scaling that whole numbers cannot hold is done in floats: no wrap-around, no OverflowError"
    path = base.write(scl_slope=slope, scl_inter=inter)
    want = np.clip(nib.load(path).get_fdata(), -1024, 32767)
    if want.min()>-200: refused(path, 'every voxel|not HU')
    else: assert np.allclose(open_ct(path).data.transpose(2,1,0)[:,::-1], want)

@pytest.mark.fault('H18')
@each('name', ['scan.nii', 'scan.nii.gz'])
@each('dim', [(10,8,7), (9,8,8), (32767,)*3, (30000,30000,4)])
def test_H18_more_than_the_file(base, name, dim):
    refused(base.write(name=name, dim=[3,*dim,1,1,1,1]), 'more than the file can hold|ends too early')

@pytest.mark.fault('H18')
@pytest.mark.promise('silent')
@each('name', ['scan.nii', 'scan.nii.gz'])
@each('dim', [(9,8,6), (9,7,7), (8,8,7)])
def test_H18_more_in_the_file_than_declared(base, name, dim):
    "A header that names too few slices, rows or columns is refused: the file is longer than it says"
    refused(base.write(name=name, dim=[3,*dim,1,1,1,1]), 'follow the voxels that the header declares')

@pytest.mark.fault('H18')
@pytest.mark.promise('silent')
@each('name', ['scan.nii', 'scan.nii.gz'])
@each('more', [b'xyz', bytes(513), bytes(100)+b'x', 'twice', bytes(2**20+1)], ids=['3_bytes','513_zeros','a_late_byte','a_second_file','a_mebibyte'])
@each('at', [None, 400], ids=['appended','inserted'])
def test_H18_bytes_put_in(base, name, more, at):
    "Bytes appended to a scan, or inserted into it, are refused: voxels would lie in the wrong place"
    more = base.raw if more=='twice' else more
    at = at and sizes[base.version]+at
    raw = base.raw+more if at is None else base.raw[:at]+more+base.raw[at:]
    refused(base.write(raw, name), 'follow the voxels that the header declares|unpacks to far more')

@pytest.mark.fault('H18')
@each('name', ['scan.nii', 'scan.nii.gz'])
@each('n', [1, 8, 512])
def test_H18_zeros_at_the_end(base, name, n):
    "Some tools pad a file"
    same(noted(base.write(base.raw+bytes(n), name), f'{n} zero bytes follow'), base)

@pytest.mark.fault('D6')
@each('opener', [open_ct, open_mask])
def test_negative_slope(base, opener): refused(base.write(scl_slope=-1), 'rescale slope is negative', opener)

@pytest.mark.fault('H7')
@pytest.mark.promise('silent')
@each('axis', [1,2,3])
def test_spacing_is_told_twice(base, axis):
    "An affine with another spacing than the header's own is noted"
    path = base.write(qform_code=0, pixdim={axis:1.5})
    vol = noted(path, 'the header gives the spacing as .*, its affine as 0.7×0.8×2.5 mm')
    same(vol, base); same_affine(vol, path)

@pytest.mark.fault('H7')
@each('tiny', [1e-300, 1e-40, 5e-324])
@each('sform', [0, 1])
def test_H7_spacing_near_zero(tmp_path, tiny, sform):
    "NIfTI-2's doubles can hold a spacing whose square is 0"
    base = Base(tmp_path, 2)
    for axes in ([1],[1,2,3]):
        path = base.write(sform_code=sform, pixdim={i:tiny for i in axes})
        refused(path, 'singular|are not a CT|disagree')
    refused(base.write(qform_code=0, srow=[tiny,0,0,0, 0,tiny,0,0, 0,0,tiny,0]), 'singular|are not a CT')

@pytest.mark.fault('H18')
@each('dim', [[0,9,8,7,1,1,1,1], [8,9,8,7,1,1,1,1], [-1,9,8,7,1,1,1,1], [3,9,8,-7,1,1,1,1], [3,0,8,7,1,1,1,1], [4,9,8,7,0,1,1,1]])
def test_H18_impossible_sizes(base, dim): refused(base.write(dim=dim), 'impossible sizes')

@pytest.mark.fault('H19')
@each('code,mm', [(1,1000), (3,.001)], ids=['metre','micrometre'])
def test_H19_units(base, code, mm):
    "Repaired: lengths become mm, the mask keeps the file's own units"
    raw = patch(base.raw, base.version, base.order, pixdim=[1,.7/mm,.8/mm,2.5/mm,0,0,0,0], srow=(upright[:3]/mm).ravel().tolist(), qform_code=0)
    path = base.write(raw, xyzt_units=code)
    vol = noted(path, 'lengths were in units of')
    assert np.allclose(vol.spacing, (2.5,.8,.7)); same(vol, base); mask_fits(vol, path, base.folder)
    assert np.array_equal(open_mask(base.folder/'out.nii.gz', like=vol).data, vol.data>0)

@pytest.mark.fault('H19')
def test_H19_units_of_the_qform(base):
    x = peek(base.raw, base.version, base.order, 'qoffset')
    vol = noted(base.write(pixdim={1:.0007,2:.0008,3:.0025}, qoffset=[o/1000 for o in x], sform_code=0, xyzt_units=1), 'lengths were')
    assert np.allclose(vol.spacing, (2.5,.8,.7))

@pytest.mark.fault('H19')
@each('code', [4, 5, 7])
def test_H19_unknown_units(base, code): refused(base.write(xyzt_units=code), 'unknown unit')

@pytest.mark.fault('H19')
@each('code', [0, 2, 10, 2+16])
def test_H19_mm_or_unset(base, code):
    "0 is taken as mm; the bits above 7 are units of time"
    assert np.allclose(quiet(base.write(xyzt_units=code)).spacing, (2.5,.8,.7))

@pytest.mark.fault('H20')
@each('dim', [[4,9,8,7,1,1,1,1], [5,9,8,7,1,1,1,1], [7,9,8,7,1,1,1,1]])
def test_H20_one_time_point(base, dim):
    path = base.write(dim=dim)
    vol = quiet(path)
    same(vol, base); mask_fits(vol, path, base.folder)
    assert nib.load(base.folder/'out.nii.gz').shape==tuple(dim[1:1+dim[0]])

@pytest.mark.fault('H20')
@each('dim', [[4,9,8,7,2,1,1,1], [5,9,8,7,1,3,1,1], [4,9,8,7,30000,1,1,1]])
def test_H20_several_volumes(base, dim):
    refused(base.write(base.raw+bytes(9*8*7*2*3), dim=dim), 'more than one volume')

@pytest.mark.fault('H21')
@each('dim', [[1,63,1,1,1,1,1,1], [2,9,8,1,1,1,1,1], [3,9,8,1,1,1,1,1], [3,1,8,7,1,1,1,1]])
def test_H21_slice(base, dim): refused(base.write(dim=dim), 'not a 3D scan')

@pytest.mark.fault('H22')
@each('dim', [[3,9,8,3,1,1,1,1], [3,9,2,7,1,1,1,1]])
def test_H22_few_slices(base, dim): refused(base.write(dim=dim), 'not a 3D scan')

@pytest.mark.fault('H22')
@each('mm', [10, 20])
def test_H22_thick_slices(base, mm):
    affine = np.diag([-.7,.8,mm,1])
    vol = noted(base.write(nifti(base.data, affine, base.version, base.order)), f'very thick slices: {mm} mm')
    assert np.allclose(vol.spacing, (mm,.8,.7))
