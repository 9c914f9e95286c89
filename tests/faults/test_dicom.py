"Faults of DICOM series, C1 to C26: each is made here from a valid series of a patient called DOE^JANE, whose name no message may show"
import logging, os, re, stat, struct, subprocess, sys, warnings, zlib
from pathlib import Path

import numpy as np, pydicom, pytest
from pydicom.dataset import Dataset
from pydicom.uid import JPEG2000Lossless, RLELossless

import covid3d.dicom as cd, covid3d.dicom_file as cf
from covid3d.dicom import find_series, open_scan, open_series, pseudonym, read_slices, save_dicom, survey, volume_of, write_series
from covid3d.dicom_seg import require_seg, save_seg
from covid3d.volume import CTError, save_volume
from dicom_files import (by_simpleitk, encode, enhanced, jane, meta, native, noted, packed, quiet, refused, same_image, save_all, scan, sets_of)

each = pytest.mark.parametrize
pytestmark = pytest.mark.usefixtures('no_fsync')

@pytest.fixture(autouse=True)
def nobody(caplog, capfd, recwarn):
    "Whatever a test does: no name in the log, the warnings, or on the terminal"
    caplog.set_level(logging.DEBUG)
    yield
    out,err = capfd.readouterr()
    assert not re.search('DOE|JANE', caplog.text+out+err+''.join(str(o.message) for o in recwarn))

@pytest.fixture
def sets(): return sets_of()

def same(vol, want=None): assert np.array_equal(vol.data, (want or scan()).data) and np.allclose(vol.affine, (want or scan()).affine, atol=1e-4)

def shift(ds, x=0, y=0, z=0): ds.ImagePositionPatient = [f'{float(a)+b:.6f}' for a,b in zip(ds.ImagePositionPatient, (x,y,z))]

def raw_of(ds, path)->bytes:
    save_dicom(ds, path)
    return path.read_bytes()

def rewrite(path, old, new, n=1):
    "Replace bytes in a file"
    raw = path.read_bytes()
    assert raw.count(old)==n
    path.write_bytes(raw.replace(old, new))

def element(tag, vr, value, order='<')->bytes:
    "An element of explicit VR as bytes, whatever its value"
    long = vr in ('OB','OW','UN','SQ')
    return struct.pack(order+'HH', tag>>16, tag&0xFFFF)+vr.encode()+(struct.pack(order+'HI', 0, len(value)) if long else struct.pack(order+'H', len(value)))+value

def put(path, tag, value, vr=None):
    "Give an element of an explicit little endian file another value, as bytes that pydicom would not write"
    raw,_old = path.read_bytes(),pydicom.dcmread(path)
    vr = vr or pydicom.datadict.dictionary_VR(tag)
    key = struct.pack('<HH', tag>>16, tag&0xFFFF)+pydicom.datadict.dictionary_VR(tag).encode()
    at = raw.index(key, 132)
    n = struct.unpack_from('<H', raw, at+6)[0]
    path.write_bytes(raw[:at]+element(tag, vr, value+b' '*(len(value)%2))+raw[at+8+n:])

def test_base_is_valid(tmp_path, sets):
    "What the tests below break opens without a note, so a refusal is for the fault that was made"
    same(quiet(save_all(sets, tmp_path)))

@each('lost', [[1],[2,3],[4]])
@pytest.mark.fault('C1')
def test_C1_missing_slice(tmp_path, sets, lost):
    n = len(lost)
    refused(save_all([o for i,o in enumerate(sets) if i not in lost], tmp_path), f'{n} slice{"s"*(n>1)} missing between -2')

@pytest.mark.fault('C1')
def test_C1_names_the_place(tmp_path, sets):
    assert 'between -237.5 and -232.5 mm' in refused(save_all(sets[:2]+sets[3:], tmp_path), 'Export the whole series')

@pytest.mark.fault('C1')
def test_C1_enhanced(tmp_path, sets): refused(save_all([enhanced(sets[:2]+sets[3:])], tmp_path), '1 slice missing')

def again(ds, more=0):
    "The same slice as another instance, `more` added to its pixels"
    res = meta(ds, native['little']); res.SOPInstanceUID = pydicom.uid.generate_uid()
    res.PixelData = (np.frombuffer(ds.PixelData, '<u2')+more).astype('<u2').tobytes()
    return res

@each('i', [0,2,5])
@pytest.mark.fault('C2')
def test_C2_slice_twice(tmp_path, sets, i):
    same(noted(save_all([*sets,again(sets[i])], tmp_path), '1 slice that came twice left out'))

@pytest.mark.fault('C2')
def test_C2_whole_series_twice(tmp_path, sets):
    vol = noted(save_all([*sets,*map(again, sets)], tmp_path), '6 slices that came twice')
    same(vol); assert all(len(s.uids)==2 for s in vol.source.slices)

@pytest.mark.promise('lost')
@pytest.mark.fault('C2')
def test_C2_identifiers_of_repeats_are_kept(tmp_path, sets):
    "A slice stored under several identifiers is found by each of them, so that no outline drawn on one is lost"
    more = [again(sets[3]),again(sets[3])]
    kept = noted(save_all([*sets,*more], tmp_path), '2 slices that came twice').source.slices
    assert [s.uid for s in kept]==[o.SOPInstanceUID for o in sets]
    assert [set(s.repeats) for s in kept]==[{o.SOPInstanceUID for o in more} if i==3 else set() for i in range(6)]

@each('i', [0,3,5])
@pytest.mark.fault('C2')
def test_C2_other_pixels(tmp_path, sets, i):
    save_all([*sets,again(sets[i], 1)], tmp_path)
    message = refused(tmp_path, 'with other pixels', names=tmp_path/'IM006.dcm')
    assert f'IM00{i}.dcm' in message

@pytest.mark.fault('C2')
def test_C2_same_pixels_other_place(tmp_path, sets):
    "Equal pixels alone make no repeat"
    for ds in sets: ds.PixelData = sets[0].PixelData
    assert quiet(save_all(sets, tmp_path)).shape==scan().shape

@each('mm', [.2, -.3, 1, 1.25])
@pytest.mark.fault('C3')
def test_C3_variable_spacing(tmp_path, sets, mm):
    for ds in sets[4:]: shift(ds, z=mm)
    refused(save_all(sets, tmp_path), 'the distance of its slices varies')

@pytest.mark.fault('C3')
def test_C3_small_steps_that_add_up(tmp_path):
    "Each distance is within a tenth of a millimetre of the median, the middle slice is 0.4 mm off an even stack"
    sets = sets_of(scan((20,5,6)))
    for i,ds in enumerate(sets): shift(ds, z=.04*min(i, 10)-.04*max(i-10, 0))
    refused(save_all(sets, tmp_path), 'off an even stack')

@each('noise', [1e-6, .01, .04])
@pytest.mark.fault('C4')
def test_C4_float_noise(tmp_path, sets, noise):
    rng = np.random.default_rng(0)
    for ds in sets: shift(ds, *rng.uniform(-noise, noise, 3))
    vol = quiet(save_all(sets, tmp_path))
    assert np.array_equal(vol.data, scan().data) and np.allclose(vol.affine, scan().affine, atol=3*noise+1e-6)

@pytest.mark.fault('C4')
def test_C4_positions_in_tenths(tmp_path):
    "A step of 0.625 mm, positions rounded to 0.6, 1.2, 1.9 …"
    sets = sets_of(scan((20,5,6), spacing=(.625,.8,.7)))
    for ds in sets: ds.ImagePositionPatient = [f'{float(o):.1f}' for o in ds.ImagePositionPatient]
    assert np.isclose(quiet(save_all(sets, tmp_path)).spacing[0], .625, atol=.01)

@each('degrees', [1, -12, 25])
@pytest.mark.fault('C5')
def test_C5_gantry_tilt(tmp_path, sets, degrees):
    for i,ds in enumerate(sets): shift(ds, y=2.5*i*np.tan(np.radians(degrees)))
    refused(save_all(sets, tmp_path), f'tilted by {abs(degrees):.1f}°')

@pytest.mark.fault('C5')
def test_C5_rounded_direction_is_no_tilt(tmp_path):
    "Cosines of three digits lean the stack by 0.03°; what is left is in the affine"
    sets = sets_of(scan((100,5,6)))
    for i,ds in enumerate(sets): shift(ds, y=2.5*i*.0005)
    same(quiet(save_all(sets, tmp_path)), replace_affine(scan((100,5,6)), .0005*2.5))

def replace_affine(vol, y):
    vol.affine = vol.affine.copy(); vol.affine[1,0] = -y
    return vol

@pytest.mark.fault('C5')
def test_C5_one_slice_aside(tmp_path, sets):
    shift(sets[2], x=3)
    refused(save_all(sets, tmp_path), 'shifted sideways by up to 3 mm')

@each('kind', [['ORIGINAL','PRIMARY','LOCALIZER'], 'LOCALIZER', ['DERIVED','SECONDARY','localizer','X']])
@pytest.mark.fault('C6')
def test_C6_scout(tmp_path, sets, kind):
    scout = meta(sets[0], native['little']); scout.SOPInstanceUID = '1.2.3.9'; scout.ImageType = kind
    same(noted(save_all([*sets,scout], tmp_path), 'left aside: 1 scout view'))

@pytest.mark.fault('C6')
def test_C6_few_slices(tmp_path, sets):
    save_all(sets, tmp_path); save_all(sets_of(scan((3,9,7)), series=2), tmp_path, 'few{:03d}.dcm')
    same(noted(tmp_path, 'left aside: 1 series of fewer than four slices'))

@each('n', [1,3])
@pytest.mark.fault('C6')
def test_C6_nothing_else(tmp_path, sets, n): refused(save_all(sets[:n], tmp_path), 'holds no CT series .but . series of fewer than four slices')

@each('bigger', [0,1])
@pytest.mark.fault('C7')
def test_C7_several_series(tmp_path, bigger):
    "The one with the most slices, by name; a file of the other picks the other; never both in one volume"
    vols = [scan((5+2*(bigger==i),9,7), seed=i) for i in (0,1)]
    for i,v in enumerate(vols): save_all(sets_of(v, series=i+3), tmp_path, f'{i}_{{:03d}}.dcm')
    same(noted(tmp_path, rf'2 series in the folder: number {bigger+3}, with the most slices \(7\), was taken'), vols[bigger])
    for i,v in enumerate(vols): same(quiet(tmp_path/f'{i}_002.dcm'), v)

@pytest.mark.fault('C7')
def test_C7_equally_many(tmp_path):
    "A tie is broken by the series number, not by the order of the folder"
    for i,name in ((2,'a'),(1,'b')): save_all(sets_of(scan(seed=i), series=i), tmp_path, name+'{}.dcm')
    same(noted(tmp_path, 'number 1, with the most slices'), scan(seed=1))

@each('unit', [[1,0,0,0,-1,0], [0,1,0,1,0,0], [.9950,.0998,0,-.0998,.9950,0]])
@pytest.mark.fault('C8')
def test_C8_mixed_orientation(tmp_path, sets, unit):
    sets[3].ImageOrientationPatient = [f'{o:.6f}' for o in np.array(unit)/np.repeat(np.linalg.norm(np.reshape(unit, (2,3)), axis=1), 3)]
    save_all(sets, tmp_path)
    with pytest.raises(CTError, match='ImageOrientationPatient is not that of the rest') as e: open_series(tmp_path)
    assert str(e.value.what).startswith(str(tmp_path/'IM'))

@each('unit', [[1,0,0,1,0,0], [0,0,0,0,0,0], [2,0,0,0,2,0], [1,0,0,0,1], [1,0,0,.1,1,0]])
@pytest.mark.fault('C8')
def test_C8_no_orientation(tmp_path, sets, unit):
    sets[3].ImageOrientationPatient = unit
    save_all(sets, tmp_path); refused(tmp_path, 'ImageOrientationPatient', names=tmp_path/'IM003.dcm')

@each('name,value', [('Rows',8), ('Columns',6), ('PixelSpacing',[.8,.71]), ('BitsStored',12), ('PixelRepresentation',1), ('FrameOfReferenceUID','1.2.3')])
@pytest.mark.fault('C8')
def test_C8_other_grid(tmp_path, sets, name, value):
    ds = sets[3]; setattr(ds, name, value)
    ds.HighBit = ds.BitsStored-1; ds.PixelData = ds.PixelData[:ds.Rows*ds.Columns*2]
    save_all(sets, tmp_path)
    with pytest.raises(CTError, match='is not that of the rest of the series') as e: open_series(tmp_path)
    assert str(e.value.what).startswith(str(tmp_path/'IM'))

@each('per_frame', [False,True])
@each('syntax', ['little','big','rle','j2k','jpegls','jpeg'])
@pytest.mark.fault('C9')
def test_C9_enhanced(tmp_path, sets, syntax, per_frame):
    same(quiet(save_all([encode(enhanced(sets, per_frame), (native|packed)[syntax])], tmp_path)))

@pytest.mark.fault('C9')
def test_C9_frames_in_any_order(tmp_path, sets): same(quiet(save_all([enhanced([sets[i] for i in (3,0,5,1,4,2)])], tmp_path)))

@each('n', [0, 5, 7, 4097, -1])
@pytest.mark.fault('C9')
def test_C9_number_of_frames(tmp_path, sets, n):
    ds = enhanced(sets); ds.NumberOfFrames = n
    save_all([ds], tmp_path); refused(tmp_path, 'NumberOfFrames does not fit', names=tmp_path/'IM000.dcm')

@each('name', ['PlanePositionSequence','PlaneOrientationSequence','PixelMeasuresSequence','PixelValueTransformationSequence'])
@pytest.mark.fault('C9')
def test_C9_missing_group(tmp_path, sets, name):
    ds = enhanced(sets); g = ds.SharedFunctionalGroupsSequence[0]
    if name in g: del g[name]
    else: del ds.PerFrameFunctionalGroupsSequence[2][name]
    save_all([ds], tmp_path); refused(tmp_path, 'missing', names=tmp_path/'IM000.dcm')

@pytest.mark.fault('C9')
def test_C9_several_frames_in_a_classic_file(tmp_path, sets):
    for ds in sets: ds.NumberOfFrames = 2; ds.PixelData *= 2
    save_all(sets, tmp_path); refused(tmp_path, 'several frames, but is not an enhanced CT', names=tmp_path/'IM000.dcm')

@pytest.mark.fault('C10')
def test_C10_enhanced_in_implicit_vr(tmp_path, sets):
    save_all([encode(enhanced(sets), native['implicit'])], tmp_path)
    refused(tmp_path, 'enhanced CT in implicit VR', names=tmp_path/'IM000.dcm')

def rescaled(sets, slopes, inters):
    for ds,a,b in zip(sets, slopes, inters): ds.RescaleSlope,ds.RescaleIntercept = a,b
    return sets

@each('slopes,inters', [('111111',[-1024,-1000,-1024,-1030,-1024,-1050]), (['1','2','1','1','4','3'],['-1024']*6),
    (['1','.5','1.25','1','1','2'],['-1024','-1024.5','-1000','-1024','-1024','-1030'])])
@pytest.mark.fault('C11')
def test_C11_rescale_of_each_slice(tmp_path, sets, slopes, inters):
    stored = [np.frombuffer(o.PixelData, '<u2').reshape(9,7).astype(float) for o in sets]
    vol = noted(save_all(rescaled(sets, slopes, inters), tmp_path), 'its slices differ in their rescale: each has its own')
    assert np.allclose(vol.data, np.clip([x*float(a)+float(b) for x,a,b in zip(stored, slopes, inters)], -1024, 32767), atol=1e-3)
    assert (vol.data.dtype==np.int16)==all(float(o).is_integer() for o in (*slopes,*inters))

@pytest.mark.fault('C11')
def test_C11_rescale_of_each_frame(tmp_path, sets):
    rescaled(sets, ['1','2']*3, ['-1024','-1000']*3)
    stored = [np.frombuffer(o.PixelData, '<u2').reshape(9,7)*float(o.RescaleSlope)+float(o.RescaleIntercept) for o in sets]
    assert np.array_equal(open_series(save_all([enhanced(sets, per_frame=True)], tmp_path)).data, np.maximum(stored, -1024))

@each('name', ['RescaleSlope','RescaleIntercept'])
@each('i', [0,4])
@pytest.mark.fault('C12')
def test_C12_rescale_missing(tmp_path, sets, name, i):
    delattr(sets[i], name)
    save_all(sets, tmp_path); refused(tmp_path, 'not HU', names=tmp_path/f'IM00{i}.dcm')

@each('kind', ['HU', 'hu', 'Houndsfield Unit', 'Hounsfield Unit', 'HOUNSFIELD UNITS', 'hounsfield', ' HU ', ''])
@pytest.mark.fault('C12')
def test_C12_spellings_of_hounsfield(tmp_path, sets, kind):
    "GE writes Houndsfield (sic)"
    for ds in sets: ds.RescaleType = kind
    same(quiet(save_all(sets, tmp_path)))

@each('kind', ['classic','enhanced'])
@pytest.mark.fault('C12')
@pytest.mark.promise('silent')
def test_C12_negative_slope(tmp_path, sets, kind):
    "A series whose numbers fall where tissue gets denser is refused"
    for ds in sets: ds.RescaleSlope = '-1'
    save_all(sets if kind=='classic' else [enhanced(sets)], tmp_path)
    refused(tmp_path, 'RescaleSlope is negative', names=tmp_path/'IM000.dcm')

@each('name', ['US','OD','MGML','Z_EFF','HU_MOD','Hound',jane], ids=range(7))
@pytest.mark.fault('C12')
def test_C12_no_hu(tmp_path, sets, name):
    sets[1].RescaleType = name
    save_all(sets, tmp_path); refused(tmp_path, 'RescaleType says that the values are not HU', names=tmp_path/'IM001.dcm')

@pytest.mark.fault('C12')
def test_C12_type_not_given(tmp_path, sets):
    "RescaleType is only given where it differs from HU in many files (PS3.3 C.8.2.1: required where the image is no ORIGINAL)"
    for ds in sets: del ds.RescaleType
    same(quiet(save_all(sets, tmp_path)))

@each('name,value', [('RescaleSlope',b'0'), ('RescaleSlope',b'nan'), ('RescaleSlope',b'inf'), ('RescaleSlope',b'1\\2'),
    ('RescaleSlope',b''), ('RescaleIntercept',b'1_0'), ('RescaleIntercept',b'1e9'), ('RescaleIntercept',b'DOE^JANE')], ids=range(8))
@pytest.mark.fault('C12')
def test_C12_rescale_no_number(tmp_path, sets, name, value):
    save_all(sets, tmp_path); put(tmp_path/'IM002.dcm', pydicom.datadict.tag_for_keyword(name), value)
    refused(tmp_path, name, names=tmp_path/'IM002.dcm')

@pytest.mark.fault('C12')
def test_C12_stored_as_grey(tmp_path, sets):
    "An identity rescale on stored values 0 …: nothing below -200 is found, and no guess is made"
    assert 'Export the original series' in refused(save_all(rescaled(sets, ['1']*6, ['0']*6), tmp_path), 'not HU')

@each('signed', [0,1])
@pytest.mark.fault('C13')
def test_C13_jpeg2000_of_the_other_sign(tmp_path, sets, signed):
    "Readers disagree by 65536·slope on such files: refused"
    for ds in sets: ds.PixelRepresentation = 1-signed
    coded = [encode(o, JPEG2000Lossless) for o in sets]
    for ds in coded: ds.PixelRepresentation = signed
    save_all(coded, tmp_path); refused(tmp_path, 'disagree on whether the numbers are signed', names=tmp_path/'IM000.dcm')

@pytest.mark.fault('C13')
def test_C13_same_sign(tmp_path, sets):
    for ds in sets: ds.PixelRepresentation = 1
    same(quiet(save_all([encode(o, JPEG2000Lossless) for o in sets], tmp_path)))

@each('syntax', packed)
@pytest.mark.fault('C14')
def test_C14_no_decoder(tmp_path, sets, monkeypatch, syntax):
    save_all([encode(o, packed[syntax]) for o in sets], tmp_path)
    same(quiet(tmp_path))
    monkeypatch.setattr(pydicom.pixels.decoders.base.Decoder, 'is_available', property(lambda self: False))
    message = refused(tmp_path, 'no decoder is installed', names=tmp_path/'IM000.dcm')
    assert "pip install 'covid3d[dicom]'" in message

@each('syntax', ['1.2.840.10008.1.2.4.100','1.2.840.10008.1.2.1.98','1.2.3.4','1.2.840.10008.1.2.DOE^JANE',''], ids=range(5))
@pytest.mark.fault('C14')
def test_C14_unknown_syntax(tmp_path, sets, syntax):
    save_all(sets, tmp_path); path = tmp_path/'IM002.dcm'
    raw = path.read_bytes(); old = b'1.2.840.10008.1.2.1\0'; at = raw.index(b'\x02\0\x10\0UI')
    new = syntax.encode()+b'\0'*(len(syntax)%2)
    path.write_bytes(raw[:at+6]+struct.pack('<H', len(new))+new+raw[at+8+len(old):])
    refused(tmp_path, 'encoding of DICOM is not read|damaged|does not end', names=path)

def lie(ds, syntax, path):
    "A file whose transfer syntax is another than that of its bytes"
    raw = raw_of(ds, path); at = raw.index(b'\x02\0\x10\0UI')
    n = struct.unpack_from('<H', raw, at+6)[0]; new = syntax.encode()+b'\0'*(len(syntax)%2)
    path.write_bytes(raw[:at+6]+struct.pack('<H', len(new))+new+raw[at+8+n:])

lies = [(a,b,s) for a in native|packed for b in native|packed for s in ((5,24,20),(5,130,100)) if a!=b and (s[1]==24 or {a,b}<=set(native))]
@each('truth,said,shape', lies, ids=lambda o: None if isinstance(o, str) else f'{o[1]}rows')
@pytest.mark.fault('C15')
def test_C15_transfer_syntax_lies(tmp_path, truth, said, shape):
    "Every pair of encodings, with pixels shorter and longer than what the next two characters would be as a length"
    for i,ds in enumerate(sets_of(scan(shape))): lie(encode(ds, (native|packed)[truth]), (native|packed)[said], tmp_path/f'IM{i}.dcm')
    with pytest.raises(CTError) as e: open_series(tmp_path)
    assert str(e.value).startswith(str(tmp_path/'IM0.dcm')) and '\n' not in str(e.value)

@each('order', ['reversed','random'])
@pytest.mark.fault('C16')
def test_C16_instance_number_is_not_asked(tmp_path, sets, order):
    "Nor SliceLocation, nor the name of the file"
    number = list(range(6))[::-1] if order=='reversed' else np.random.default_rng(0).permutation(6).tolist()
    for i,ds in zip(number, sets): ds.InstanceNumber,ds.SliceLocation = i+1,str(-i)
    same(quiet(save_all([sets[i] for i in number], tmp_path)))

@pytest.mark.fault('C16')
def test_C16_no_instance_number(tmp_path, sets):
    for ds in sets: del ds.InstanceNumber
    same(quiet(save_all(sets[::-1], tmp_path)))

@each('said', ['5', '1.25', '-5'])
@pytest.mark.fault('C17')
def test_C17_spacing_between_slices(tmp_path, sets, said):
    for ds in sets: ds.SpacingBetweenSlices = said
    same(noted(save_all(sets, tmp_path), f'SpacingBetweenSlices says {abs(float(said)):g} mm, the positions 2.5 mm'))

@pytest.mark.fault('C17')
def test_C17_thickness_is_not_the_step(tmp_path, sets):
    for ds in sets: ds.SliceThickness = '5'; ds.SpacingBetweenSlices = '-2.5'
    same(quiet(save_all(sets, tmp_path)))

@pytest.mark.fault('C18')
def test_C18_negated_column_cosine(tmp_path, sets):
    "Rows from back to front: the voxels are turned over, and the segmentation with them, to the same place"
    for ds in sets:
        x = np.frombuffer(ds.PixelData, '<u2').reshape(9,7); ds.PixelData = x[::-1].tobytes()
        shift(ds, y=8*.8); ds.ImageOrientationPatient = [1,0,0,0,-1,0]
    vol = quiet(save_all(sets, tmp_path/'in'))
    same(vol); same_image(vol, *by_simpleitk(tmp_path/'in'))
    save_seg(dict(lesion=vol.data>0), vol, tmp_path/'seg.dcm')
    assert np.array_equal(pydicom.dcmread(tmp_path/'seg.dcm').pixel_array, (scan().data>0)[::-1,::-1])  # the normal points down: from head to foot

def other(uid, **kwargs):
    ds = Dataset(); ds.SOPClassUID,ds.SOPInstanceUID,ds.PatientName,ds.PatientID = uid,'1.2.3.4',jane,jane
    for k,v in kwargs.items(): setattr(ds, k, v)
    return ds

@each('uid,name', [('1.2.840.10008.5.1.4.1.1.88.67','X-Ray Radiation Dose SR'), ('1.2.840.10008.5.1.4.1.1.66.4','Segmentation Storage'), ('1.2.840.10008.5.1.4.1.1.11.1','Grayscale Softcopy Presentation State'),
    ('1.2.840.10008.5.1.4.1.1.7','Secondary Capture'), ('1.2.3.99','object of another kind'), ('','object of another kind'), ('DOE^JANE','object of another kind')], ids=range(7))
@pytest.mark.fault('C19')
def test_C19_other_objects(tmp_path, sets, uid, name):
    save_all(sets, tmp_path); ds = other('1.2.3.88'); save_dicom(ds, tmp_path/'other')
    put(tmp_path/'other', 0x00080016, uid.encode())
    same(noted(tmp_path, f'left aside: 1 {name}'))

@each('name,content', [('notes',b'seen by DOE^JANE'), ('empty',b''), ('.hidden.dcm',b'x'), ('._IM000.dcm',b'x'), ('readme.txt',b'x'), ('scan.nii.gz',b'x'), ('zeros',bytes(5000))])
@pytest.mark.fault('C19')
def test_C19_other_files(tmp_path, sets, name, content):
    save_all(sets, tmp_path); (tmp_path/name).write_bytes(content); (tmp_path/'folder').mkdir()
    same(open_series(tmp_path))

@each('content', [b'', b'x', bytes(5000), b'<html>'+b' '*500])
@pytest.mark.fault('C19')
def test_C19_unreadable_slice(tmp_path, sets, content):
    "A file that calls itself DICOM may be the missing slice, the empty one of a failed copy too: not skipped"
    save_all(sets, tmp_path); (tmp_path/'IM005.dcm').write_bytes(content)
    refused(tmp_path, 'this is not DICOM, although its name says so', names=tmp_path/'IM005.dcm')

@pytest.mark.fault('C19')
def test_C19_is_counted(tmp_path, sets):
    save_all(sets, tmp_path)
    for i in range(3): save_dicom(other('1.2.840.10008.5.1.4.1.1.88.67'), tmp_path/f'dose{i}')
    (tmp_path/'notes').write_text('x')
    same(noted(tmp_path, 'left aside: 3 X-Ray Radiation Dose SR Storage, 1 file that is not DICOM'))

def dicomdir(path, to):
    "An index that refers to another file"
    rec,ds = Dataset(),other('1.2.840.10008.1.3.10')
    rec.DirectoryRecordType,rec.ReferencedFileID,rec.ReferencedSOPClassUIDInFile = 'IMAGE',to,'1.2.840.10008.5.1.4.1.1.2'
    ds.FileSetID,ds.DirectoryRecordSequence = 'JANE',[rec]
    save_dicom(ds, path)

@each('name', ['DICOMDIR','dicomdir','index','index.dcm'])
@each('to', [['..','secret'], ['','etc','passwd'], ['..','..','..','secret']])
@pytest.mark.fault('C20')
def test_C20_dicomdir_is_not_followed(tmp_path, sets, name, to, monkeypatch):
    "Nothing outside the folder is opened"
    folder = save_all(sets, tmp_path/'a'/'b'/'in'); dicomdir(folder/name, to)
    for d in (tmp_path,tmp_path/'a'/'b'): (d/'secret').write_bytes((folder/'IM000.dcm').read_bytes())
    opened = []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event=='open' else None)
    same(open_series(folder))
    assert any(o.endswith('IM003.dcm') for o in opened) and not any('secret' in o or 'passwd' in o or '..' in o for o in opened)

@pytest.mark.fault('C20')
@pytest.mark.promise('executed')
def test_C20_link_out_of_the_folder(tmp_path, sets):
    "Reading DICOM follows neither a DICOMDIR nor a link out of the folder"
    save_all(sets[:5], tmp_path/'in'); save_all(sets[5:], tmp_path/'out')
    os.symlink(tmp_path/'out'/'IM000.dcm', tmp_path/'in'/'IM005.dcm')
    assert noted(tmp_path/'in', 'left aside: 1 link out of the folder').shape==(5,9,7)

@pytest.mark.fault('F6','C20')
@pytest.mark.promise('lost')
def test_F6_links_that_lead_nowhere(tmp_path, sets):
    "A link to itself, to its own folder, or to nothing ends nothing: it is counted, and the slices beside it are read"
    save_all(sets, tmp_path)
    for name,to in (('IM900.dcm','IM900.dcm'), ('a','b'), ('b','a'), ('loop','.'), ('up','..'), ('gone.dcm','nowhere.dcm')): os.symlink(to, tmp_path/name)
    same(noted(tmp_path, 'left aside: 4 broken link'))
    same(quiet(tmp_path/'IM003.dcm'))
    refused(tmp_path/'IM900.dcm', 'no such file')

@pytest.mark.fault('C19','C21')
def test_C19_what_is_no_file(tmp_path, sets):
    "A pipe, a device and a folder under the name of a slice are counted, and nobody waits for them"
    save_all(sets, tmp_path); os.mkfifo(tmp_path/'IM900.dcm'); (tmp_path/'IM901.dcm').mkdir()
    try: os.mknod(tmp_path/'IM902', stat.S_IFCHR|0o666, os.makedev(1, 5)); n = 2  # /dev/zero
    except PermissionError: n = 1
    same(noted(tmp_path, f'left aside: 1 folder named like a DICOM file, {n} pipe or device'))
    for opener in (open_series, open_scan, read_slices): refused(tmp_path/'IM900.dcm', 'pipe or a device', opener=opener)
    refused('/dev/zero', 'pipe or a device')

def two_series(tmp_path):
    "A folder with two series, of 6 and 5 slices"
    a,b = sets_of(),sets_of(scan((5,9,7), seed=1), series=2)
    save_all(a, tmp_path, 'a{}.dcm'); save_all(b, tmp_path, 'b{}.dcm')
    return a,b

@pytest.mark.fault('C7','C19')
@pytest.mark.promise('silent')
def test_C19_damage_of_another_series(tmp_path):
    "A damaged DICOM file refuses the series that it may belong to, and only those"
    a,b = two_series(tmp_path)
    del b[2].RescaleSlope; save_dicom(b[2], tmp_path/'b2.dcm')
    found = survey(tmp_path)
    assert [len(s.damaged) for s in found.series]==[0,1] and len(found.damaged)==1 and found.skipped=={'file that cannot be read':1}
    same(quiet(tmp_path/'a3.dcm'))
    for path in (tmp_path,tmp_path/'b3.dcm',tmp_path/'b2.dcm'): refused(path, 'RescaleSlope or RescaleIntercept is missing', names=tmp_path/'b2.dcm')
    (tmp_path/'c.dcm').write_bytes(b'')  # of which series?
    assert [len(s.damaged) for s in survey(tmp_path).series]==[1,2]
    refused(tmp_path/'a3.dcm', 'this is not DICOM', names=tmp_path/'c.dcm')

@pytest.mark.fault('C19','X14')
@pytest.mark.promise('lost')
def test_C19_a_survey_ends_for_nothing(tmp_path, sets, monkeypatch):
    "One damaged DICOM file does not hide what else lies in its folder: all is counted by kind"
    save_all(sets, tmp_path); save_all(sets_of(scan((3,9,7)), series=2), tmp_path, 'few{:03d}.dcm')
    save_dicom(other('1.2.840.10008.5.1.4.1.1.4'), tmp_path/'mr'); save_dicom(other('1.2.840.10008.5.1.4.1.1.66.4'), tmp_path/'seg')
    (tmp_path/'cut.dcm').write_bytes((tmp_path/'IM003.dcm').read_bytes()[:300]); (tmp_path/'notes').write_text('x')
    opened = cf._no_wait
    def locked(p, flags):
        if Path(p).name=='IM002.dcm': raise PermissionError(13, 'Permission denied')
        return opened(p, flags)
    monkeypatch.setattr(cf, '_no_wait', locked)
    found = survey(tmp_path)
    assert found.skipped=={'MR Image Storage':1, 'Segmentation Storage':1, 'file that is not DICOM':1, 'file that cannot be read':2, 'series of fewer than four slices':1}
    assert [len(s.slices) for s in found.series]==[5] and [Path(e.what).name for e in found.damaged]==['IM002.dcm','cut.dcm']
    with pytest.raises(CTError, match='Permission denied'): volume_of(found.series[0])
    assert survey(tmp_path/'nowhere').damaged and survey(tmp_path/'IM000.dcm').damaged and survey('a\0b').damaged

@pytest.mark.fault('X15')
@pytest.mark.promise('named')
def test_X15_identifiers_are_not_shown(tmp_path, sets):
    "No note and no repr of a series shows an identifier, a number of the patient, or a date of its DICOM files"
    for ds in sets: ds.SeriesNumber = '19700101'  # a birth date in a place where nobody looks
    save_all(sets, tmp_path); save_all(sets_of(scan((5,9,7)), series=2), tmp_path, 'b{}.dcm')
    vol,found = open_series(tmp_path),survey(tmp_path)
    shown = f'{vol} {vol.notes} {vol.source} {found} {find_series(tmp_path)} {read_slices(tmp_path/"IM000.dcm")} {found.series[0].slices[0]!r}'
    values = [str(o.value) for ds in sets for o in ds.iterall() if o.VR in ('UI','PN','DA','TM','SH','LO') and len(str(o.value))>3 and o.keyword not in ('SOPClassUID','Manufacturer')]
    assert len(set(values))>12 and not [v for v in values if v in shown] and '19700101' not in shown
    assert pseudonym(sets[0].SeriesInstanceUID) in shown

@each('where', ['empty','as_array'])
@pytest.mark.fault('D14')
def test_D14_too_little_memory(tmp_path, sets, monkeypatch, where):
    "A series that does not fit in memory is an error of that series"
    save_all(sets if where=='empty' else [encode(o, RLELossless) for o in sets], tmp_path)
    def none(*args, **kwargs): raise MemoryError('DOE^JANE')
    if where=='empty':
        monkeypatch.setattr(cd.np, 'empty', none)
        refused(tmp_path, 'there is not enough memory for its 6 slices of 9×7 pixels')
    else:
        monkeypatch.setattr(pydicom.pixels.decoders.base.Decoder, 'as_array', none)
        refused(tmp_path, 'there is not enough memory to read it', names=tmp_path/'IM000.dcm')

def test_D14_too_little_memory_for_a_header(tmp_path, sets, monkeypatch):
    save_all(sets, tmp_path)
    def none(*args, **kwargs): raise MemoryError
    monkeypatch.setattr(cf, '_parse', none)
    assert len(survey(tmp_path).damaged)==6 and 'not enough memory' in survey(tmp_path).damaged[0].fault

@each('mm', [.0005, .01, -.3])
@pytest.mark.promise('silent')
@pytest.mark.fault('C8')
def test_C8_spacing_of_one_slice(tmp_path, sets, mm):
    "A pixel spacing, direction or format that one slice alone states otherwise is refused, wherever it lies"
    for i in (0,3,5):
        changed = [meta(o, native['little']) for o in sets]; changed[i].PixelSpacing = ['.8',f'{.7+mm:g}']
        save_all(changed, tmp_path/str(i))
        with pytest.raises(CTError, match='its PixelSpacing is not that of the rest'): open_series(tmp_path/str(i))

limits = '''
import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (2*2**30,)*2); resource.setrlimit(resource.RLIMIT_CPU, (10, 10))
from covid3d.dicom import open_series
from covid3d.volume import CTError
try: print(open_series(sys.argv[1]).shape)
except CTError as e: print(e)
'''
def bounded(folder, quiet=True)->str:
    "What comes of a folder within 2 GiB and some seconds of a processor, in a process of its own; decoders in C may write to stderr if not `quiet`"
    p = subprocess.run([sys.executable,'-c',limits,folder], capture_output=True, text=True, timeout=120)
    assert p.returncode==0 and not (quiet and p.stderr) and p.stdout.count('\n')==1 and not re.search('DOE|JANE', p.stdout+p.stderr), p.stderr
    return p.stdout

def spoiled(sets, folder, edit)->str:
    "The series with one file's bytes changed"
    save_all(sets, folder)
    raw = (folder/'IM002.dcm').read_bytes()
    (folder/'IM002.dcm').write_bytes(edit(raw, raw.index(b'\x28\0\x02\0US')))  # the element SamplesPerPixel, 0028,0002
    return bounded(folder)

@pytest.mark.fault('C21')
def test_C21_executable_preamble(tmp_path, sets):
    "The first 128 bytes are anything; here, the head of a Windows program. They are never run, and the voxels are right"
    save_all(sets, tmp_path)
    for p in tmp_path.iterdir(): p.write_bytes(b'MZ\x90\0'+b'\xcc'*124+p.read_bytes()[128:])
    same(quiet(tmp_path))

@each('n', [1, 2, 512, 100_000])
@pytest.mark.fault('C21')
def test_C21_trailing_zeros(tmp_path, sets, n):
    save_all(sets, tmp_path)
    for p in tmp_path.iterdir(): p.write_bytes(p.read_bytes()+bytes(n))
    same(quiet(tmp_path))

@pytest.mark.fault('C21')
def test_C21_trailing_padding_element(tmp_path, sets):
    save_all(sets, tmp_path)
    for p in tmp_path.iterdir(): p.write_bytes(p.read_bytes()+element(0xFFFCFFFC, 'OB', bytes(64)))
    same(quiet(tmp_path))

@each('tail', [b'DOE^JANE'*4, b'\x01', b'\xff'*512])
@each('syntax', ['little','j2k'])
@pytest.mark.fault('C21')
def test_C21_trailing_garbage(tmp_path, sets, tail, syntax):
    "Bytes that belong to nothing: something was put in further up"
    save_all([encode(o, (native|packed)[syntax]) for o in sets], tmp_path); path = tmp_path/'IM003.dcm'
    path.write_bytes(path.read_bytes()+tail)
    refused(tmp_path, 'what follows its pixels is damaged|cannot be decoded', names=path)

loops = dict(
    open_sequence=b'\x28\0\0\0SQ\0\0\xff\xff\xff\xff', open_unknown=b'\x28\0\0\0UN\0\0\xff\xff\xff\xff',
    open_items=b'\x28\0\0\0SQ\0\0\xff\xff\xff\xff'+b'\xfe\xff\0\xe0\xff\xff\xff\xff'*5000,
    empty_items=b'\x28\0\0\0SQ\0\0\xff\xff\xff\xff'+b'\xfe\xff\0\xe0\0\0\0\0'*200_000, nested=b'\x28\0\0\0SQ\0\0\xff\xff\xff\xff\xfe\xff\0\xe0\xff\xff\xff\xff'*50_000,
    nested_listed=b'\0\x52\x30\x92SQ\0\0\xff\xff\xff\xff\xfe\xff\0\xe0\xff\xff\xff\xff'*50_000, delimiters=b'\xfe\xff\xdd\xe0\0\0\0\0'*100_000, zeros=bytes(1_000_000),
    small_elements=b''.join(struct.pack('<HH2sH', 9+2*(i>>16), i&0xFFFF, b'LO', 0) for i in range(400_000)), open_pixels=b'\xe0\x7f\x10\0OB\0\0\xff\xff\xff\xff'*100_000)
@each('name', loops)
@pytest.mark.fault('C21')
def test_C21_undefined_lengths(tmp_path, sets, name):
    assert str(tmp_path) in spoiled(sets, tmp_path, lambda raw,at: raw[:at]+loops[name]+raw[at:])

@each('length', [0xFFFFFFFE, 0xFFFFFFFF])
@each('head', [b'\x28\0\0\0UN\0\0', b'\x28\0\0\0OB\0\0', b'\x28\0\0\0SQ\0\0', b'\xe0\x7f\x10\0OW\0\0', b'\x02\0\x02\x01OB\0\0'])
@pytest.mark.fault('C21')
def test_C21_length_claims_4_GB(tmp_path, sets, head, length):
    assert str(tmp_path/'IM002.dcm') in spoiled(sets, tmp_path, lambda raw,at: raw[:at]+head+struct.pack('<I', length)+raw[at:])

@pytest.mark.fault('C21')
def test_C21_header_without_end(tmp_path, sets):
    "A gigabyte of private elements (a sparse file): 6 MiB of it are looked at"
    save_all(sets, tmp_path); path = tmp_path/'IM002.dcm'
    raw = path.read_bytes(); at = raw.index(b'\x28\0\x02\0US')
    path.write_bytes(raw[:at]+b'\x29\0\x10\x10UN\0\0'+struct.pack('<I', 2**30)); os.truncate(path, 2**30+at+12)
    assert str(path) in bounded(tmp_path)

@each('syntax,rows,columns', [('little',65535,65535), ('j2k',65535,65535), *((k,8192,8192) for k in ('little',*packed))])
@pytest.mark.fault('C21')
def test_C21_huge_image(tmp_path, sets, syntax, rows, columns):
    "Each file claims up to 8 GB of pixels and holds 126 bytes"
    sets = [encode(o, (native|packed)[syntax]) for o in sets]
    for ds in sets: ds.Rows,ds.Columns = rows,columns
    save_all(sets, tmp_path); assert str(tmp_path) in bounded(tmp_path)

@pytest.mark.fault('C21')
def test_C21_huge_enhanced(tmp_path, sets):
    ds = enhanced(sets*100); ds.Rows = ds.Columns = 8192; ds.PixelData = sets[0].PixelData
    save_all([ds], tmp_path); assert 'not a CT' in bounded(tmp_path)

@each('syntax', ['j2k','jpegls','jpeg'])
@pytest.mark.fault('C21')
def test_C21_codestream_claims_more(tmp_path, sets, syntax):
    "60000×60000 in the compressed pixels themselves: seen before a decoder asks for the memory"
    save_all([encode(o, packed[syntax]) for o in sets], tmp_path); path = tmp_path/'IM002.dcm'
    old,new = (struct.pack('>II', 7, 9),struct.pack('>II', 60000, 60000)) if syntax=='j2k' else (struct.pack('>HH', 9, 7),struct.pack('>HH', 60000, 60000))
    raw = path.read_bytes(); at = raw.index(old, raw.index(b'\xe0\x7f\x10\0'))
    path.write_bytes(raw[:at]+new+raw[at+len(old):])
    assert 'of another size than its header says' in bounded(tmp_path)

@pytest.mark.fault('C21')
def test_C21_deflate_bomb(tmp_path, sets):
    "128 MiB of zeros in 130 kB: refused before it is unpacked"
    save_all(sets, tmp_path); path = tmp_path/'IM002.dcm'
    lie(sets[2], '1.2.840.10008.1.2.1.99', path)
    raw,zeros = path.read_bytes(),bytes(2**24); at = raw.index(b'\x08\0\x08\0CS')
    pack = zlib.compressobj(9, zlib.DEFLATED, -15); body = pack.compress(raw[at:])
    for _ in range(8): body += pack.compress(zeros)
    path.write_bytes(raw[:at]+body+pack.flush())
    assert 'it is deflated' in bounded(tmp_path)

@each('cut', [0, 100, 131, 132, 140, 300, 700, 1100, -200, -126, -1])
@each('syntax', ['little','rle','j2k'])
@pytest.mark.fault('C21')
def test_C21_cut_short(tmp_path, sets, cut, syntax):
    save_all([encode(o, (native|packed)[syntax]) for o in sets], tmp_path); path = tmp_path/'IM003.dcm'
    path.write_bytes(path.read_bytes()[:cut])
    refused(tmp_path, 'not DICOM|damaged|does not end|ends too early|cannot be decoded|missing|less or more|no pixel data', names=path)

@each('extra', [0, 2, 12, 14, 200])
@pytest.mark.fault('C21')
def test_C21_more_pixels_than_rows_and_columns(tmp_path, sets, extra):
    "Less than a row more is padding; from a row on, rows or columns are wrong"
    for ds in sets: ds.PixelData += bytes(extra)
    save_all(sets, tmp_path)
    if extra<14: same(quiet(tmp_path))
    else: refused(tmp_path, 'less or more pixel data', names=tmp_path/'IM000.dcm')

def repack(ds, path, frame):
    "A compressed file whose only frame is `frame`"
    ds = meta(ds, ds.file_meta.TransferSyntaxUID); ds.PixelData = pydicom.encaps.encapsulate([frame]) if isinstance(frame, bytes) else b''.join(frame)
    ds['PixelData'].VR = 'OB'; ds['PixelData'].is_undefined_length = True
    save_dicom(ds, path)

def item(x=b'')->bytes: return b'\xfe\xff\0\xe0'+struct.pack('<I', len(x))+x

@each('name', ['frame','fragments','tail'])
@pytest.mark.fault('C21')
def test_C21_more_compressed_than_plain(tmp_path, sets, name):
    "Millions of empty fragments, elements or bytes where 126 bytes of pixels are packed: not read"
    coded = [encode(o, RLELossless) for o in sets]; save_all(coded, tmp_path); path = tmp_path/'IM002.dcm'
    if name=='frame': repack(coded[2], path, bytes(2**24))
    elif name=='fragments': repack(coded[2], path, [item()]*2**21)
    else: path.write_bytes(path.read_bytes()+element(0xFFFCFFFC, 'OB', b'')*2**20)
    assert 'larger than they would be without compression' in bounded(tmp_path)

@pytest.mark.fault('C21')
def test_C21_small_elements_after_the_pixels(tmp_path, sets):
    coded = [encode(o, RLELossless) for o in sets]; save_all(coded, tmp_path); path = tmp_path/'IM002.dcm'
    path.write_bytes(path.read_bytes()+b''.join(struct.pack('<HH2sH', 0x8001+2*(i>>16), i&0xFFFF, b'LO', 0) for i in range(120_000)))
    assert str(path) in bounded(tmp_path) or '(6, 9, 7)' in bounded(tmp_path)

@each('size', [1,33])
@pytest.mark.fault('C21')
def test_C21_jpeg2000_of_tiny_tiles(tmp_path, size):
    "A codestream that divides 8192×8192 into very many tiles: a decoder sets up each"
    sets = sets_of(scan((4,24,20))); coded = [encode(o, JPEG2000Lossless) for o in sets]
    for i,ds in enumerate(coded):
        x = bytearray(next(pydicom.encaps.generate_frames(ds.PixelData, number_of_frames=1)))
        ds.Rows = ds.Columns = 8192
        x[8:16] = struct.pack('>II', 8192, 8192); x[24:32] = struct.pack('>II', size, size)  # Xsiz, Ysiz; XTsiz, YTsiz
        repack(ds, tmp_path/f'IM{i}.dcm', bytes(x))
    assert str(tmp_path) in bounded(tmp_path, quiet=False)

@pytest.mark.fault('C21')
def test_C21_a_second_frame_header(tmp_path, sets):
    "JPEG that first says 9×7 and then 60000×60000"
    coded = [encode(o, packed['jpeg']) for o in sets]; save_all(coded, tmp_path)
    x = next(pydicom.encaps.generate_frames(coded[2].PixelData, number_of_frames=1)); at = x.index(b'\xff\xc3')
    n = 2+struct.unpack('>H', x[at+2:at+4])[0]; huge = x[at:at+5]+struct.pack('>HH', 60000, 60000)+x[at+9:at+n]
    repack(coded[2], tmp_path/'IM002.dcm', x[:at+n]+huge+x[at+n:])
    assert str(tmp_path/'IM002.dcm') in bounded(tmp_path, quiet=False)

@each('n', [4096, 4097, 49_000, 200_000])
@pytest.mark.fault('C21')
def test_C21_items_of_frames(tmp_path, sets, n):
    "An enhanced CT whose list of frames has more items than a CT has slices"
    save_all([enhanced(sets)], tmp_path); path = tmp_path/'IM000.dcm'; raw = path.read_bytes()
    at,end = raw.index(b'\0\x52\x30\x92SQ'),raw.index(b'\xe0\x7f\x10\0OW')
    path.write_bytes(raw[:at]+element(0x52009230, 'SQ', item()*n)+raw[end:])
    assert str(path) in bounded(tmp_path)

@each('syntax', packed)
@pytest.mark.fault('C21')
def test_C21_codestream_cut_short(tmp_path, sets, syntax):
    "Half a slice, properly wrapped: no decoder may fill in the rest"
    coded = [encode(o, packed[syntax]) for o in sets_of(scan((5,24,20)))]
    x = next(pydicom.encaps.generate_frames(coded[2].PixelData, number_of_frames=1))
    coded[2].PixelData = pydicom.encaps.encapsulate([x[:len(x)//4*2]])
    save_all(coded, tmp_path); refused(tmp_path, 'cannot be decoded|damaged|of another size', names=tmp_path/'IM002.dcm')

@pytest.mark.fault('C21')
def test_C21_element_twice(tmp_path, sets):
    "pydicom believes the second, GDCM the first; here the second would move HU by 1000"
    save_all(sets, tmp_path); path = tmp_path/'IM003.dcm'
    raw = path.read_bytes(); at = raw.index(b'\xe0\x7f\x10\0OW')
    path.write_bytes(raw[:at]+element(0x00281052, 'DS', b'-24 ')+raw[at:])
    refused(tmp_path, 'header is damaged', names=path)

@pytest.mark.fault('C22')
def test_C22_empty_segment_is_kept(tmp_path, sets):
    vol = open_series(save_all(sets, tmp_path/'in'))
    save_seg(dict(lesion=np.zeros(vol.shape, np.uint8), lung=vol.data>0), vol, tmp_path/'seg.dcm')
    seg = pydicom.dcmread(tmp_path/'seg.dcm')
    assert [(o.SegmentNumber,o.SegmentLabel) for o in seg.SegmentSequence]==[(1,'lesion'),(2,'lung')]
    x = seg.pixel_array.reshape(2, *vol.shape)
    assert not x[0].any() and np.array_equal(x[1], vol.data>0)
    assert [g.SegmentIdentificationSequence[0].ReferencedSegmentNumber for g in seg.PerFrameFunctionalGroupsSequence]==[1]*6+[2]*6

@each('kind', ['classic','shuffled','enhanced','enhanced_shuffled'])
@pytest.mark.fault('C23')
def test_C23_frames_lie_where_they_say(tmp_path, sets, kind):
    "Whatever the order of the source: each frame of the segmentation holds the mask of the slice at its position, and refers to it"
    order = [3,0,5,1,4,2] if 'shuffled' in kind else range(6)
    shuffled = [sets[i] for i in order]
    vol = open_series(save_all([enhanced(shuffled)] if 'enhanced' in kind else shuffled, tmp_path/'in'))
    mask = (scan().data>-300).astype(np.uint8); mask[4] = 0
    save_seg(dict(lesion=mask), vol, tmp_path/'seg.dcm')
    seg = pydicom.dcmread(tmp_path/'seg.dcm')
    z = [float(g.PlanePositionSequence[0].ImagePositionPatient[2]) for g in seg.PerFrameFunctionalGroupsSequence]
    for zz,frame,g in zip(z, seg.pixel_array, seg.PerFrameFunctionalGroupsSequence):
        i = round((zz+240)/2.5)
        source = g.DerivationImageSequence[0].SourceImageSequence[0]
        assert np.array_equal(frame, mask[i])
        if 'enhanced' in kind: assert source.ReferencedFrameNumber==list(order).index(i)+1
        else: assert source.ReferencedSOPInstanceUID==sets[i].SOPInstanceUID
    assert sorted(z)==[-240+2.5*i for i in range(6)]

@each('edit', ['flag','jpegls near-lossless'])
@pytest.mark.fault('C24')
def test_C24_lossy(tmp_path, sets, edit):
    if edit=='flag': sets[2].LossyImageCompression = '01'
    elif edit=='jpegls near-lossless':
        for ds in sets: ds.file_meta = meta(ds, native['little']).file_meta; ds.compress(pydicom.uid.JPEGLSNearLossless, jls_error=2, generate_instance_uid=False)
    vol = noted(save_all(sets, tmp_path), 'its pixels were once compressed with loss')
    assert abs(vol.data-scan().data).max()<=2*(edit!='flag')

@pytest.mark.fault('C24')
def test_C24_not_lossy(tmp_path, sets):
    for ds in sets: ds.LossyImageCompression = '00'
    same(quiet(save_all(sets, tmp_path)))

@pytest.mark.fault('C25')
def test_C25_two_patients_in_a_series(tmp_path, sets):
    sets[3].PatientID = 'DOE^JOHN'
    refused(save_all(sets, tmp_path), 'mixes two patients')

@pytest.mark.fault('C25')
def test_C25_two_patients_in_a_folder(tmp_path, sets):
    more = sets_of(scan(seed=1), series=2, seed='other')
    for ds in more: ds.PatientID = 'DOE^JOHN'
    save_all(sets, tmp_path); save_all(more, tmp_path, 'b{}.dcm')
    refused(tmp_path, 'belong to more than one patient')
    same(quiet(tmp_path/'b2.dcm'), scan(seed=1))

@pytest.mark.fault('C25')
def test_C25_two_frames_of_reference(tmp_path, sets):
    for ds in sets[3:]: ds.FrameOfReferenceUID = '1.2.3.4'
    save_all(sets, tmp_path); refused(tmp_path, 'FrameOfReferenceUID is not that of the rest', names=tmp_path/'IM003.dcm')

@each('uid', ['../../x', '/etc/passwd', '1.2'*4000, '..', 'con', 'a\nb', 'DOE^JANE'], ids='up absolute huge dots device newline name'.split())
@pytest.mark.fault('C26')
def test_C26_hostile_uid(tmp_path, sets, uid):
    "UIDs name nothing on the disk, and come into no message"
    folder = tmp_path/'a'/'b'/'in'; save_all(sets, folder)
    for p in folder.iterdir():
        for tag in (0x00080018,0x0020000D,0x0020000E,0x00200052): put(p, tag, uid.encode())
    vol = open_series(folder); same(vol)
    before = sorted(o.name for o in tmp_path.rglob('*'))
    for masks,name in ((dict(lesion=vol.data>0),'seg.dcm'),):
        with pytest.raises(CTError) as e: save_seg(masks, vol, tmp_path/name)
        assert '\n' not in str(e.value) and uid not in str(e.value)
    assert sorted(o.name for o in tmp_path.rglob('*'))==before

@pytest.mark.fault('C26')
def test_C26_series_names_its_files_itself(tmp_path):
    "`write_series` numbers its files; a patient's name in the identifiers stays out"
    write_series(scan(), tmp_path, patient='../../DOE^JANE', seed='../../x')
    assert sorted(o.name for o in tmp_path.iterdir())==[f'IM{i:04d}.dcm' for i in range(1, 7)]

tags = dict(position=0x00200032, unit=0x00200037, spacing=0x00280030, slope=0x00281053, step=0x00180088, number=0x00200011,
    image_type=0x00080008, lossy=0x00282110, rescale_type=0x00281054, photometric=0x00280004)
@each('name', tags)
@each('value', [b'DOE^JANE', b'DOE^JANE\\DOE^JANE\\1\n'], ids=['name','list'])
@each('vr', [None, 'PN', 'LT'])
@pytest.mark.fault('X15')
@pytest.mark.promise('named')
def test_no_name_is_shown(tmp_path, sets, name, value, vr):
    "A patient's name in any element of DICOM that is read comes into no message, note, log or warning"
    for ds in sets: ds.SpacingBetweenSlices,ds.LossyImageCompression = '2.5','00'
    save_all(sets, tmp_path)
    for p in tmp_path.iterdir(): put(p, tags[name], value, vr)
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        try: vol = open_series(tmp_path); assert not re.search('DOE|JANE|\n', f'{vol.notes} {vol} {vol.source.slices} {survey(tmp_path)}')
        except CTError as e: assert not re.search('DOE|JANE|\n', str(e))
    assert not w

@each('name', ['PatientBirthDate','StudyDate','PatientSex','AccessionNumber','StudyInstanceUID','PatientName'])
@pytest.mark.fault('X15')
@pytest.mark.promise('named')
def test_no_name_is_shown_when_a_segmentation_is_written(tmp_path, sets, name):
    "A DICOM Segmentation is written, or refused in a line that names nobody"
    save_all(sets, tmp_path/'in')
    for p in (tmp_path/'in').iterdir(): put(p, pydicom.datadict.tag_for_keyword(name), b'DOE^JANE'*9)
    vol = open_series(tmp_path/'in')
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        try: save_seg(dict(lesion=vol.data>0), vol, tmp_path/'seg.dcm'); assert pydicom.dcmread(tmp_path/'seg.dcm').SOPClassUID
        except CTError as e: assert not re.search('DOE|JANE|\n', str(e))
    assert not re.search('DOE|JANE', ''.join(str(o.message) for o in w))

@pytest.mark.fault('C20','C26')
@pytest.mark.promise('executed')
def test_C26_nothing_is_written_by_reading(tmp_path, sets, monkeypatch):
    "Opening DICOM writes nothing, starts nothing and connects to nothing, whatever the files hold"
    folder = save_all(sets, tmp_path); dicomdir(folder/'DICOMDIR', ['..','secret'])
    for p in folder.glob('IM*'):
        for tag in (0x00080018,0x0020000D,0x0020000E): put(p, tag, b'../../x')
    open_series(folder)  # whatever is imported on first use is
    done = []
    def watch(event, args):
        if event=='open' and isinstance(args[2], int) and args[2]&(os.O_WRONLY|os.O_RDWR|os.O_CREAT) or event.split('.')[0] in ('subprocess','socket','shutil') or \
            event in ('os.system','os.exec','os.remove','os.rename','os.mkdir','exec','compile','pickle.find_class'): done.append((event, args))
    sys.addaudithook(lambda event, args: watch(event, args) if on else None)
    on = [1]; open_series(folder); on.clear()
    assert done==[]

@pytest.mark.fault('C19')
def test_segmentation_is_refused_before_work(tmp_path, sets, monkeypatch):
    "What cannot have a DICOM Segmentation is told before anything is segmented"
    save_all(sets, tmp_path/'in'); save_volume(scan(), tmp_path/'ct.nii.gz')
    require_seg(tmp_path/'in'); require_seg(open_series(tmp_path/'in'))
    for what in (tmp_path/'ct.nii.gz', scan()):
        with pytest.raises(CTError, match='not read from DICOM'): require_seg(what)
    for ds in sets: ds.FrameOfReferenceUID = ''
    with pytest.raises(CTError, match='FrameOfReferenceUID is missing'): require_seg(open_series(save_all(sets, tmp_path/'in')))
    monkeypatch.setitem(sys.modules, 'highdicom', None)
    with pytest.raises(CTError, match='needs highdicom'): require_seg(tmp_path/'in')
