"Masks that do not fit their scan, P1 to P8 and P11 (P9 and P10 concern lungs and cohorts and come with those)"
import nibabel as nib, numpy as np, pytest
from nibabel import orientations
from covid3d.volume import open_ct, open_mask
from nifti_bytes import Base, hu, nifti, noted, quiet, refused, upright

each = pytest.mark.parametrize
blob = np.zeros((9,8,7), np.uint8); blob[1:4,2:7,1:3] = 1; blob[7,0,6] = 1  # no symmetry in any axis

@pytest.fixture
def ct(base): return open_ct(base.write())

def mask(base, data=blob, affine=upright, name='mask.nii.gz', **kwargs):
    return base.write(nifti(data, affine, base.version, base.order, **kwargs), name)

def test_fits(base, ct):
    m = quiet(mask(base), open_mask, like=ct)
    assert np.array_equal(m.data, blob.transpose(2,1,0)[:,::-1]) and np.array_equal(m.affine, ct.affine)

@pytest.mark.fault('P1')
@each('data', [blob[:-1], blob[:,:-1], blob[...,:-1], blob.transpose(1,0,2), np.pad(blob, 1)])
def test_P1_shape(base, ct, data): refused(mask(base, data), 'its shape .* is not that of scan.nii', open_mask, like=ct)

@pytest.mark.fault('P2')
@each('scale', [(1.02,1,1), (1,1,2), (.9,1,1)])
def test_P2_spacing(base, ct, scale): refused(mask(base, affine=upright@np.diag([*scale,1])), 'its affine differs', open_mask, like=ct)

def moved(mm=0, degrees=0):
    "The grid shifted and turned about the body axis"
    c,s = np.cos(np.deg2rad(degrees)),np.sin(np.deg2rad(degrees))
    return nib.affines.from_matvec([[c,-s,0],[s,c,0],[0,0,1]])@nib.affines.from_matvec(np.eye(3), [mm,0,0])@upright

@pytest.mark.fault('P3')
@each('affine', [moved(.08), moved(-1), moved(100), moved(degrees=1), np.diag([-1,-1,1,1])@upright], ids=['0.08mm','1mm','100mm','1deg','lps'])
def test_P3_affine(base, ct, affine): refused(mask(base, affine=affine), 'its affine differs', open_mask, like=ct)

@pytest.mark.fault('P3')
@each('mm', [.002, -.01, .06])
def test_P3_fraction_of_a_voxel(base, ct, mm):
    "Less than a tenth of a voxel at every corner: another tool's rounding"
    m = noted(mask(base, affine=moved(mm)), f'by {abs(mm)/.7:.2g} of a voxel', open_mask, like=ct)
    assert np.array_equal(m.affine, ct.affine)

@pytest.mark.fault('P3')
def test_P3_corners_not_origin(tmp_path):
    "A spacing that is wrong by 0.05 % is float noise at the origin and a third of a voxel at the far end of 600 slices"
    data = np.zeros((4,5,600), np.int16); data[::2] = -1000
    far = Base(tmp_path, data=data); like = open_ct(far.write())
    near = upright@np.diag([1,1,1.0005,1])
    refused(far.write(nifti(np.zeros_like(data), near), 'mask.nii'), r'by 0\.3 voxels at a corner', open_mask, like=like)

@pytest.mark.fault('P3')
@each('mm', [2e-5, 5e-4, -6e-4])
def test_P3_float_noise(base, ct, mm):
    m = noted(mask(base, affine=moved(mm)), 'float noise', open_mask, like=ct)
    assert np.array_equal(m.affine, ct.affine)

@pytest.mark.fault('P4')
@each('axes', ['RAS','LPS','LPI','RPI','PSR','SAL','ILA','AIR'])
def test_P4_other_orientation(base, ct, axes):
    "Same voxels in the patient, stored in other axes: the mask comes back the same"
    turn = orientations.ornt_transform(orientations.io_orientation(upright), orientations.axcodes2ornt(axes))
    affine = upright@orientations.inv_ornt_aff(turn, blob.shape)
    m = open_mask(mask(base, orientations.apply_orientation(blob, turn), affine), like=ct)
    assert np.array_equal(m.data, blob.transpose(2,1,0)[:,::-1])

@pytest.mark.fault('P4')
@each('axis', [0,1,2])
def test_P4_flipped_affine(base, ct, axis):
    "An affine that says the axis runs the other way about the same origin puts the mask elsewhere in the patient"
    refused(mask(base, affine=upright@np.diag([-1 if i==axis else 1 for i in range(3)]+[1])), 'its affine differs', open_mask, like=ct)

@pytest.mark.fault('P5')
@each('labels,listed', [((0,2),'0, 2'), ((0,1,25),'0, 1, 25'), ((0,128),'0, 128'), (tuple(range(20)),'0, 1, 2, 3, 4, 5, 6, 7, …')])
def test_P5_labels(base, ct, labels, listed):
    data = np.resize(labels, blob.shape).astype(np.uint8)
    refused(mask(base, data), f'labels {listed}, expected only 0, 1', open_mask, like=ct)
    assert np.array_equal(np.unique(open_mask(base.folder/'mask.nii.gz', like=ct, labels=range(256)).data), labels)

@pytest.mark.fault('P6')
def test_P6_empty(base, ct): assert quiet(mask(base, blob*0), open_mask, like=ct).data.sum()==0

@pytest.mark.fault('P7')
@each('dtype', [np.int16, np.float32])
def test_P7_ct_as_mask(base, ct, dtype): refused(mask(base, hu().astype(dtype)), 'negative values .* is it a CT', open_mask, like=ct)

@pytest.mark.fault('P7')
def test_P7_same_file(base, ct): refused(ct.source.path, 'is it a CT', open_mask, like=ct)

@pytest.mark.fault('P8')
@each('value', [.5, .01, .99, np.nan, np.inf])
def test_P8_fractions(base, ct, value): refused(mask(base, np.where(blob, value, 0)), 'fractions, not labels|NaN or infinite', open_mask, like=ct)

@pytest.mark.fault('P8')
@each('scaling', [(1/255,0), (.5,0), (1,.5)])
def test_P8_fractions_by_scaling(base, ct, scaling): refused(mask(base, blob*101, scaling=scaling), 'fractions, not labels', open_mask, like=ct)

@pytest.mark.fault('P11')
@each('dtype', [np.uint8, np.int16, np.float64])
def test_P11_png(base, ct, dtype): refused(mask(base, (blob*255).astype(dtype)), '0 and 255: divide by 255', open_mask, like=ct)

@pytest.mark.fault('P11')
def test_P11_png_by_scaling(base, ct):
    "0 and 255 that the header scales to 0 and 1 are labels"
    assert np.array_equal(open_mask(mask(base, blob*255, scaling=(1/255,0)), like=ct).data, blob.transpose(2,1,0)[:,::-1])

@each('axes', ['LPS','RAS','SPL'])
@each('dtype', [np.uint8, np.int16])
def test_mask_can_be_drawn_on(base, axes, dtype):
    "The array is its own, whatever the file's axes: not a read-only window on the file's bytes"
    affine = nib.affines.from_matvec(orientations.inv_ornt_aff(orientations.ornt_transform(orientations.axcodes2ornt('RAS'), orientations.axcodes2ornt(axes)), blob.shape)[:3,:3])
    m = open_mask(mask(base, blob.astype(dtype), affine))
    m.data[0,0,0] = 1
    assert m.data.flags.c_contiguous
