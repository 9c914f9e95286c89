"Fixtures shared by the tests; being here also lets tests in folders below import the helpers beside this file"
import os, pytest
from hypothesis import settings
from nifti_bytes import Base, formats

@pytest.fixture(params=formats, ids=lambda o: f'nifti{o[0]}{"le" if o[1]=="<" else "be"}')
def base(request, tmp_path): return Base(tmp_path, *request.param)

@pytest.fixture
def plain(tmp_path): return Base(tmp_path)

@pytest.fixture(scope='module')
def no_fsync():
    "For tests that write thousands of small masks and look at none after a power cut"
    with pytest.MonkeyPatch.context() as m: m.setattr(os, 'fsync', lambda fd: None); yield

slow = 'workers resume kills reproduce site real distributed memory pretrain prepare'.split()

def pytest_collection_modifyitems(items):
    "The files that take longest come first, so that at the end no process waits for one of them"
    items.sort(key=lambda o: slow.index(name) if (name := o.path.stem.removeprefix('test_')) in slow else len(slow))

# the same examples in every run; COVID3D_EXPLORE=1 draws new ones
settings.register_profile('steady', derandomize=not os.environ.get('COVID3D_EXPLORE'), deadline=None)
settings.load_profile('steady')
