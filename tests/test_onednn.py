"""With oneDNN, programs give what they give without it, and split batches stay split."""

import functools
import platform

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import primitives
from jax.interpreters import mlir

from benchmarks import choices, harness
from neurosens import models, onednn, parallel
from neurosens.models import channel_sums as sums
from neurosens.onednn import calls, kernel_gradient, lowering

CALL = 'custom_call_target="__onednn$convolution"'
PRODUCT = 'custom_call_target="__onednn$matmul"'
CASES = {
    'same': {},
    'valid': {'padding': 'VALID'},
    'strided': {'window_strides': (2, 2)},
    'uneven': {'window_strides': (3, 2), 'padding': ((0, 2), (1, 0))},
    'channels first': {'dimension_numbers': ('NCHW', 'OIHW', 'NCHW')},
    'dilated images': {'lhs_dilation': (1, 2), 'padding': ((1, 1), (1, 0))},
    'far dilated images': {'lhs_dilation': (4, 3), 'padding': ((0, 2), (3, 1))},
}
OTHERS = {
    'dilated kernel': {'rhs_dilation': (2, 1)},
    'dilated columns': {'rhs_dilation': (1, 2)},
    'grouped': {'feature_group_count': 2},
    'cropped images': {'padding': ((-1, 2), (1, -2))},
}


@pytest.fixture(scope='module', autouse=True)
def with_onednn():
    version = '.'.join(lowering.jaxlib.__version__.split('.')[:3])
    if platform.machine() not in ('x86_64', 'AMD64') or version not in lowering._TESTED_JAXLIB:
        pytest.skip('oneDNN is only used on x86-64, with versions of jaxlib it was tested with')
    assert onednn.use_onednn(), 'the probe must agree with XLA where oneDNN is meant to be used'
    yield
    # What the other tests run with.
    rule = lowering._XLA_RULE
    mlir.register_lowering(primitives.conv_general_dilated_p, rule, platform='cpu')
    choices.sum_by_formula()
    lowering._use_cache(True)


def test_nothing_is_serialised(tmp_path):
    """XLA crashes where it writes such a program to the cache."""
    changes = {
        'jax_compilation_cache_dir': str(tmp_path),
        'jax_persistent_cache_min_compile_time_secs': 0.0,
    }
    before = {name: getattr(jax.config, name) for name in changes}
    for name, value in changes.items():
        jax.config.update(name, value)
    try:
        for used in (False, True):
            lowering._use_cache(used)
            if used:  # The cache works where it is let to.
                jax.jit(lambda x: 3 * x + 1)(jnp.ones(17)).block_until_ready()
            else:
                assert onednn.use_onednn()
                images, kernel = jnp.ones((2, 9, 9, 8)), jnp.ones((3, 3, 8, 8))
                options = {'strides': (1, 1), 'padding': ((1, 1), (1, 1))}
                jax.jit(functools.partial(calls.convolve, **options))(images, kernel)
            assert bool(list(tmp_path.iterdir())) == used
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        lowering._use_cache(False)


def convolution(case):
    options = {
        'window_strides': (1, 1),
        'padding': 'SAME',
        'dimension_numbers': ('NHWC', 'HWIO', 'NHWC'),
        **{**CASES, **OTHERS}[case],
    }
    images = jax.random.normal(jax.random.key(0), (8, 9, 8, 4))
    channels = 4 // options.get('feature_group_count', 1)
    kernel = jax.random.normal(jax.random.key(1), (3, 2, channels, 8))
    if case == 'channels first':
        images, kernel = images.transpose(0, 3, 1, 2), kernel.transpose(3, 2, 0, 1)
    return lambda x, w: lax.conv_general_dilated(x, w, **options), images, kernel


def in_numpy(images, kernel, strides, padding):
    """The definition, in float64, channels last."""
    padded = np.pad(np.float64(images), ((0, 0), *padding, (0, 0)))
    height, width = kernel.shape[:2]
    rows = range(0, padded.shape[1] - height + 1, strides[0])
    columns = range(0, padded.shape[2] - width + 1, strides[1])

    def window(i, j):
        return padded[:, i : i + height, j : j + width]

    return np.stack(
        [
            np.stack([np.einsum('bhwc,hwcd->bd', window(i, j), kernel) for j in columns], 1)
            for i in rows
        ],
        1,
    )


@pytest.mark.parametrize(
    ('strides', 'padding'),
    [
        ((1, 1), ((0, 0), (0, 0))),
        ((2, 1), ((1, 2), (0, 1))),
        ((3, 2), ((0, 1), (2, 0))),
        # Of the same shapes as the one before.
        ((3, 2), ((1, 0), (0, 2))),
    ],
)
def test_values_are_those_of_the_definition(strides, padding):
    _, images, kernel = convolution('same')
    numbers = ('NHWC', 'HWIO', 'NHWC')
    run = functools.partial(
        lax.conv_general_dilated, window_strides=strides, padding=padding, dimension_numbers=numbers
    )
    assert CALL in jax.jit(run).lower(images, kernel).compile().as_text()
    expected = in_numpy(images, np.float64(kernel), strides, padding)
    np.testing.assert_allclose(jax.jit(run)(images, kernel), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ('dilation', 'padding'),
    [
        ((2, 2), ((1, 2), (1, 1))),
        ((2, 2), ((0, 0), (0, 1))),
        ((1, 3), ((2, 0), (5, 4))),
        ((5, 2), ((0, 0), (2, 3))),
    ],
)
@pytest.mark.parametrize('size', [(9, 8), (2, 1)])
def test_dilated_images_are_those_with_zeros_between(size, dilation, padding):
    _, images, kernel = convolution('same')
    images = images[:, : size[0], : size[1]]
    apart = np.zeros((8, *((n - 1) * d + 1 for n, d in zip(size, dilation)), 4))
    apart[:, :: dilation[0], :: dilation[1]] = images
    expected = in_numpy(apart, np.float64(kernel), (1, 1), padding)
    run = functools.partial(
        lax.conv_general_dilated,
        window_strides=(1, 1),
        padding=padding,
        lhs_dilation=dilation,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )
    found = jax.jit(run).lower(images, kernel).compile()
    assert CALL in found.as_text()
    np.testing.assert_allclose(found(images, kernel), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('case', CASES)
def test_derivatives_are_those_of_finite_differences(case):
    run, images, kernel = convolution(case)
    jax.test_util.check_grads(
        jax.jit(lambda x, w: jnp.sin(run(x, w)).sum()), (images, kernel), order=2, eps=1e-2,
        atol=0.1, rtol=0.05,
    )  # fmt: skip


@pytest.mark.parametrize('case', CASES)
def test_gradients_of_images_use_it_too(case):
    run, images, kernel = convolution(case)
    gradient = jax.jit(jax.grad(lambda x, w: jnp.sin(run(x, w)).sum()))
    text = gradient.lower(images, kernel).compile().as_text()
    # One for each phase that meets the kernel of 3 x 2.
    calls = {
        'strided': 1 + 4,
        'uneven': 1 + 6,
        'dilated images': 2 + 1,
        'far dilated images': 6,
    }
    assert text.count(CALL) == calls.get(case, 2)


@pytest.fixture(params=[False, True], ids=['products', 'convolutions'])
def avx512(request, monkeypatch):
    """Whether gradients of kernels are made for a processor with AVX-512, this one or not."""
    monkeypatch.setattr(kernel_gradient, 'has_avx512', lambda: request.param)
    kernel_gradient._over_devices.cache_clear()
    yield request.param
    kernel_gradient._over_devices.cache_clear()


@pytest.mark.parametrize('case', [*CASES, 'dilated kernel', 'dilated columns', 'cropped images'])
def test_gradients_of_kernels_are_those_of_xla(case, avx512):
    run, images, kernel = convolution(case)
    cotangents = jax.random.normal(jax.random.key(2), jax.eval_shape(run, images, kernel).shape)

    def gradient(kernel, cotangents):
        return jax.vjp(lambda kernel: run(images, kernel), kernel)[1](cotangents)[0]

    program = jax.jit(gradient).lower(kernel, cotangents).compile()
    # The axis of columns and channels has no room for steps of columns.
    by_product = not avx512 or case == 'dilated columns'
    assert program.as_text().count(PRODUCT) == by_product
    assert program.as_text().count(CALL) == (not by_product)
    # Linear in the kernel: its derivative in the direction of a position is the position's value.
    one = jax.jit(lambda kernel: jnp.vdot(run(images, kernel), cotangents))
    basis = jnp.eye(kernel.size).reshape(kernel.size, *kernel.shape)
    expected = lax.map(one, basis).reshape(kernel.shape)
    found = program(kernel, cotangents)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('whole', [True, False])
@pytest.mark.parametrize('windows', [0.1, 0.5, 1.0, 1.5, 3.2, 99.0])
def test_results_do_not_depend_on_how_much_a_cache_holds(windows, whole, monkeypatch):
    run, x, kernel = convolution('strided')
    x = x if whole else x[:7]
    cotangents = jax.random.normal(jax.random.key(2), jax.eval_shape(run, x, kernel).shape)
    form = kernel_gradient.Windows((1, 1), (2, 2), ((1, 1), (0, 0)))
    # Without a cache to mind, all images and positions are one product.
    monkeypatch.setattr(kernel_gradient, '_CACHE_BYTES', 2**40)
    products = functools.partial(kernel_gradient.products, windows=form)
    expected = jax.jit(products)(x, cotangents)
    of_image = 6 * cotangents[0, ..., 0].size * 4 * 4
    others = (x.nbytes + cotangents.nbytes) // len(x)
    monkeypatch.setattr(kernel_gradient, '_CACHE_BYTES', int(windows * (of_image + others)))
    found = jax.jit(functools.partial(kernel_gradient.products, windows=form))
    program = found.lower(x, cotangents).compile()
    # A tenth of an image's windows, images and cotangents holds no more than one position of six.
    assert program.as_text().count(PRODUCT) == {0.1: 6, 0.5: 2}.get(windows, 1)
    assert (' while(' in program.as_text()) == (windows < len(x))
    np.testing.assert_allclose(program(x, cotangents), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('case', ['strided', 'uneven', 'dilated kernel', 'cropped images'])
@pytest.mark.parametrize(
    ('channels', 'count', 'rows'),
    [(4, 16, 1), (1, 3, 9), (3, 3, 2), (2, 16, 4), (4, 1, 1), (8, 8, 2), (2, 3, 9)],
)
def test_results_do_not_depend_on_what_is_convolved_at_once(
    case, channels, count, rows, monkeypatch
):
    run, x, kernel = convolution(case)
    cotangents = jax.random.normal(jax.random.key(2), jax.eval_shape(run, x, kernel).shape)
    params = dict(jax.make_jaxpr(lambda w: jax.vjp(lambda w: run(x, w), w)[1](cotangents)[0])(
        kernel
    ).eqns[-1].params)  # fmt: skip
    names = ('window_strides', 'rhs_dilation', 'padding')
    form = kernel_gradient.Windows(*lowering._integers(params, *names))
    expected = jax.jit(functools.partial(kernel_gradient.products, windows=form))(x, cotangents)
    size = (x.nbytes + cotangents.nbytes) // len(x) * min(count, len(x))
    monkeypatch.setattr(kernel_gradient, '_CHANNELS', channels)
    monkeypatch.setattr(kernel_gradient, 'IMAGES', count)
    # As many bands as leave so many rows of cotangents in each.
    monkeypatch.setattr(kernel_gradient, '_BAND_BYTES', size // -(-cotangents.shape[1] // rows))
    found = jax.jit(functools.partial(kernel_gradient.convolutions, windows=form))
    program = found.lower(x, cotangents).compile()
    # One for what is left over after all rounds.
    whole, rest = divmod(len(x), count)
    assert program.as_text().count(CALL) == (whole > 0) + (rest > 0)
    assert (' while(' in program.as_text()) == (count < len(x) or rows < cotangents.shape[1])
    np.testing.assert_allclose(program(x, cotangents), expected, rtol=1e-4, atol=1e-5)


# Images, their size, channels, outputs, size of the kernel, stride, and padding before and behind.
SHAPES = {
    'as many as are taken at once and one': (33, 6, 3, 20, 3, 1, 1, 1),
    'several times as many as channels': (48, 5, 4, 9, 3, 1, 1, 1),
    'one image': (1, 6, 16, 17, 3, 1, 1, 1),
    'one channel': (20, 7, 1, 33, 5, 2, 2, 2),
    'one output': (5, 7, 40, 1, 3, 2, 1, 1),
}
# What may be of padding alone, which is left to products of matrices.
ODD_SHAPES = {
    'padding as wide as the images': (3, 2, 8, 8, 5, 1, 2, 2),
    'single pixels': (3, 1, 8, 8, 3, 1, 1, 1),
    'one step over an image': (4, 2, 8, 8, 3, 10, 5, 0),
    'steps over images': (4, 2, 8, 8, 3, 4, 3, 3),
}


@pytest.mark.parametrize('shape', [*SHAPES, *ODD_SHAPES])
def test_gradients_of_kernels_of_many_shapes_are_those_of_the_definition(shape, avx512):
    count, size, inputs, outputs, window, stride, low, high = {**SHAPES, **ODD_SHAPES}[shape]
    x = jax.random.normal(jax.random.key(0), (count, size, size, inputs))
    kernel = jax.random.normal(jax.random.key(1), (window, window, inputs, outputs))
    run = functools.partial(
        lax.conv_general_dilated,
        window_strides=(stride,) * 2,
        padding=((low, high),) * 2,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )
    y = jax.random.normal(jax.random.key(2), jax.eval_shape(run, x, kernel).shape)
    gradient = jax.jit(lambda w, y: jax.vjp(lambda w: run(x, w), w)[1](y)[0])
    program = gradient.lower(kernel, y).compile()
    assert (PRODUCT in program.as_text()) == (not avx512 or shape in ODD_SHAPES)
    assert (CALL in program.as_text()) == (avx512 and shape in SHAPES)
    found = program(kernel, y)
    # The sum over pixels, in double precision.
    pixels = np.zeros((count, size + 2 * low + window, size + 2 * low + window, inputs))
    pixels[:, low : low + size, low : low + size] = x
    expected = np.zeros(kernel.shape)
    for i, j in np.ndindex(y.shape[1:3]):
        rows, columns = (slice(k * stride, k * stride + window) for k in (i, j))
        expected += np.einsum('nijc,nd->ijcd', pixels[:, rows, columns], np.float64(y[:, i, j]))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('checked', [False, True])
def test_loops_over_images_are_maps_too(checked, avx512, monkeypatch):
    """A loop begins with what varies over the mesh as what it adds."""
    monkeypatch.setattr(kernel_gradient, 'IMAGES', 1)
    monkeypatch.setattr(kernel_gradient, '_CACHE_BYTES', 1)
    run, images, kernel = convolution('same')
    mesh = parallel.data_mesh(4)
    cotangents = jax.random.normal(jax.random.key(2), jax.eval_shape(run, images, kernel).shape)

    def gradient(x, y):
        # What is the same everywhere would be summed by the map itself.
        own = jax.lax.pcast(kernel, 'data', to='varying') if checked else kernel
        return jax.vjp(lambda w: run(x, w), own)[1](y)[0][None]

    mapped = jax.shard_map(
        gradient, mesh=mesh, in_specs=jax.P('data'), out_specs=jax.P('data'), check_vma=checked
    )
    found = jax.jit(mapped)(images, cotangents).sum(0)
    expected = jax.vjp(lambda w: run(images, w), kernel)[1](cotangents)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ('flags', 'known'),
    [
        ('flags\t\t: fpu avx2 avx512f avx512dq avx512bw avx512vl', True),
        ('flags\t\t: fpu avx2 avx512f avx512dq', False),
        ('Features\t: fp asimd', False),
        (None, False),
    ],
)
def test_the_processor_tells_which_instructions_it_has(flags, known, monkeypatch):
    def read(path):
        assert str(path) == '/proc/cpuinfo'
        if flags is None:
            raise FileNotFoundError
        return f'processor\t: 0\n{flags}\n\nprocessor\t: 1\n{flags}\n'

    monkeypatch.setattr(kernel_gradient.pathlib.Path, 'read_text', read)
    assert kernel_gradient.has_avx512.__wrapped__() == known


def test_gradients_of_large_kernels_and_of_few_channels_are_left_to_xla():
    images = jax.random.normal(jax.random.key(0), (2, 14, 14, 4))
    kernel = jax.random.normal(jax.random.key(1), (12, 11, 4, 8))
    numbers = ('NHWC', 'HWIO', 'NHWC')

    def loss(kernel, padding):
        found = lax.conv_general_dilated(images, kernel, (1, 1), padding, dimension_numbers=numbers)
        return jnp.sin(found).sum()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)

    def calls(kernel):
        """Of the gradient, without those of the convolution itself."""
        whole, plain = (
            jax.jit(function, static_argnums=1).lower(kernel, 'VALID').compile().as_text()
            for function in (gradient, loss)
        )
        return whole.count('__onednn$') - plain.count('__onednn$')

    assert calls(kernel) == 0
    assert calls(kernel[:11]) == 1
    assert calls(kernel[:1, :1]) == 1
    assert calls(kernel[:3, :3, :, :7]) == 0


@pytest.mark.parametrize('case', OTHERS)
def test_other_convolutions_are_left_to_xla(case):
    run, images, kernel = convolution(case)
    assert CALL not in jax.jit(run).lower(images, kernel).compile().as_text()


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_other_types_are_left_to_xla(dtype):
    run, images, kernel = convolution('same')
    low = jax.jit(run).lower(images.astype(dtype), kernel.astype(dtype)).compile()
    assert CALL not in low.as_text()


def test_further_batch_axes_and_loops():
    run, images, kernel = convolution('same')
    many = jnp.stack([images, 2 * images])
    expected = jnp.stack([run(images, kernel), run(2 * images, kernel)])
    found = jax.jit(jax.vmap(run, (0, None)))(many, kernel)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)
    kernels = jnp.stack([kernel, -kernel])
    found = jax.jit(jax.vmap(run, (None, 0)))(images, kernels)
    expected = jnp.stack([expected[0], -expected[0]])
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)

    square = jax.random.normal(jax.random.key(2), (3, 3, 4, 4)) / 6

    def body(_, x):
        return jnp.tanh(run(x, square))

    looped = jax.jit(lambda x: lax.fori_loop(0, 3, body, x))(images)
    unrolled = body(0, body(0, body(0, images)))
    chex.assert_trees_all_close(looped, unrolled, rtol=1e-4, atol=1e-5)


def test_a_split_batch_stays_split(avx512):
    mesh = parallel.data_mesh()
    run, images, kernel = convolution('same')
    gradient = jax.jit(jax.value_and_grad(lambda x, w: jnp.sin(run(x, w)).sum(), (0, 1)))
    placed = parallel.shard(mesh, images), parallel.replicate(mesh, kernel)
    program = gradient.lower(*placed).compile()
    text = program.as_text()
    assert mesh.size == 8
    assert text.count(CALL) == 2 + avx512 and text.count(PRODUCT) == (not avx512)
    assert 'all-gather' not in text and 'all-to-all' not in text
    value, slopes = program(*placed)
    assert slopes[0].sharding.spec[0] == parallel.DATA_AXIS
    assert slopes[1].sharding.is_fully_replicated
    expected = gradient(images, kernel)
    chex.assert_trees_all_close((value, slopes), expected, rtol=1e-4, atol=1e-5)


def test_a_kernel_split_over_devices_is_gathered():
    mesh = parallel.data_mesh()
    run, images, _ = convolution('same')
    kernel = jax.random.normal(jax.random.key(1), (3, 2, 4, 16))
    spread = jax.sharding.NamedSharding(mesh, jax.P(None, None, None, mesh.axis_names[0]))
    found = jax.jit(run)(parallel.replicate(mesh, images), jax.device_put(kernel, spread))
    chex.assert_trees_all_close(found, run(images, kernel), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('axes', [{'a'}, {'a', 'b'}])
def test_maps_over_some_and_over_all_axes_of_a_mesh(axes):
    mesh = jax.make_mesh((2, 4), ('a', 'b'), (jax.sharding.AxisType.Auto,) * 2)
    run, images, kernel = convolution('same')
    mapped = jax.shard_map(
        run, mesh=mesh, in_specs=(jax.P('a'), jax.P()), out_specs=jax.P('a'), axis_names=axes
    )
    found = jax.jit(mapped)(images, kernel)
    chex.assert_trees_all_close(found, run(images, kernel), rtol=1e-4, atol=1e-5)

    def slope(images):
        return jax.grad(lambda kernel: jnp.sin(run(images, kernel)).sum())(kernel)

    def added(images):
        return lax.psum(slope(images), 'a')

    in_all = jax.shard_map(
        added, mesh=mesh, in_specs=jax.P('a'), out_specs=jax.P(), axis_names=axes, check_vma=False
    )
    found = jax.jit(in_all)(images)
    chex.assert_trees_all_close(found, slope(images), rtol=1e-4, atol=1e-4)


def test_unknown_versions_keep_what_xla_chooses(monkeypatch):
    monkeypatch.setattr(lowering.jaxlib, '__version__', '99.0.0')
    monkeypatch.setattr(lowering, '_available', lowering._available.__wrapped__)
    assert not onednn.use_onednn()


def test_wrong_results_of_the_probe_keep_what_xla_chooses(monkeypatch):
    config = calls.convolution_config

    # Of the same shapes, but shifted.
    def swapped(strides, padding, **others):
        return config(strides, tuple(pair[::-1] for pair in padding), **others)

    with monkeypatch.context() as wrong:
        wrong.setattr(calls, 'convolution_config', swapped)
        wrong.setattr(lowering, '_available', lowering._available.__wrapped__)
        assert not onednn.use_onednn()
    monkeypatch.setattr(kernel_gradient, 'has_avx512', lambda: True)
    for name in ('products', 'convolutions'):
        with monkeypatch.context() as wrong:
            right = getattr(kernel_gradient, name)
            wrong.setattr(kernel_gradient, name, lambda *args, f=right, **kw: -f(*args, **kw))
            wrong.setattr(lowering, '_available', lowering._available.__wrapped__)
            assert not onednn.use_onednn()


def test_benchmarks_count_the_operations_that_calls_hide():
    images, kernel = jnp.ones((4, 8, 8, 8)), jnp.ones((3, 3, 8, 16))
    options = {'dimension_numbers': ('NHWC', 'HWIO', 'NHWC')}
    convolve = jax.jit(lambda *both: lax.conv_general_dilated(*both, (1, 1), 'VALID', **options))
    assert CALL in convolve.lower(images, kernel).compile().as_text()
    expected = 2 * 4 * 6 * 6 * 16 * 3 * 3 * 8
    assert harness.count_flops(convolve, images, kernel) == expected


# Images, their height and channels, and in how many whole pieces of 2048 numbers they are added.
SUMMED = {
    'whole pieces': ((4, 16, 32), 16),
    'one piece': ((3, 5, 7), 1),
    'one number': ((1, 1, 1), 1),
    'a piece and a rest': ((5, 5, 32), 1),
    'pieces and a rest': ((3, 16, 24), 9),
    'wide pieces and a rest': ((2, 8, 160), 10),
    'a pixel at a time': ((2, 3, 2049), 18),
}


@pytest.mark.parametrize('case', SUMMED)
def test_sums_over_channels_are_those_of_numpy(case):
    (count, size, channels), pieces = SUMMED[case]
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (count, size, size, channels)) for key in keys)
    squares = jax.jit(sums.square_sums).lower(a).compile()
    assert (' while(' in squares.as_text()) == (pieces > 1)
    products = jax.jit(lambda a, b: jax.vjp(sums.scale_shift, b, a[0, 0, 0], a[0, 0, 0])[1](a))
    of_factor, of_shift = products(a, b)[1:]
    wide_a, wide_b = np.float64(a), np.float64(b)
    axes = (0, 1, 2)
    expected = wide_a.sum(axes), (wide_a**2).sum(axes), (wide_a * wide_b).sum(axes)
    for found, one in zip((*squares(a), of_factor), expected, strict=True):
        np.testing.assert_allclose(found, one, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(of_shift, expected[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize('channels', [32, 24])
def test_sums_of_split_batches_are_sums_over_devices(channels):
    x = jax.random.normal(jax.random.key(0), (16, 16, 16, channels))
    split = jax.device_put(x, jax.NamedSharding(parallel.data_mesh(8), jax.P('data')))
    program = jax.jit(sums.square_sums).lower(split).compile()
    text = program.as_text()
    assert ' while(' in text and 'all-reduce' in text and 'all-gather' not in text
    # The loop is over what a device has.
    assert f'f32[2,16,16,{channels}]' in text or f'f32[512,{channels}]' in text
    assert f'f32[16,16,16,{channels}]' not in text and f'f32[4096,{channels}]' not in text
    np.testing.assert_allclose(program(split)[0], x.sum((0, 1, 2)), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(program(split)[1], (x * x).sum((0, 1, 2)), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ('shape', 'dtype'), [((64, 64), jnp.float32), ((4, 16, 16, 32), jnp.bfloat16)]
)
def test_other_sums_are_left_to_xla(shape, dtype):
    x = jax.random.normal(jax.random.key(0), shape).astype(dtype)
    assert ' while(' not in jax.jit(sums.square_sums).lower(x).compile().as_text()


@pytest.mark.parametrize('channels', [32, 24])
def test_normalisation_of_images_takes_two_loops(channels):
    """One for the statistics, one for the gradients."""
    module = models.BatchNorm(use_running_average=False)
    x = jax.random.normal(jax.random.key(0), (8, 16, 16, channels))
    variables = module.init(jax.random.key(1), x)

    def loss(params, x):
        seen = module.apply({**variables, 'params': params}, x, mutable=['batch_stats'])[0]
        return jnp.sin(seen).sum()

    gradient = jax.jit(jax.grad(loss, (0, 1)))
    program = gradient.lower(variables['params'], x).compile()
    assert program.as_text().count(' while(') == 2
    found = program(variables['params'], x)
    with jax.disable_jit():  # By formulas.
        expected = jax.grad(loss, (0, 1))(variables['params'], x)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ('axes', 'checked'), [({'data', 'model'}, False), ({'data', 'model'}, True), ({'data'}, False)]
)
def test_sums_in_maps_over_devices(axes, checked):
    """In one pass where all axes of the mesh are the map's."""
    mesh = jax.make_mesh((4, 2), ('data', 'model'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x = jax.random.normal(jax.random.key(0), (16, 16, 16, 24))

    def gradient(f):
        def loss(x):
            total, squares = f(x)
            return (jnp.sin(total / 30) * squares / 1000).sum()

        return jax.jit(
            jax.shard_map(
                jax.grad(loss),
                mesh=mesh,
                in_specs=jax.P('data'),
                out_specs=jax.P('data'),
                axis_names=axes,
                check_vma=checked,
            )
        )

    program = gradient(sums.square_sums).lower(x).compile()
    assert (' while(' in program.as_text()) == (len(axes) == 2)
    plain = gradient(lambda x: (x.sum((0, 1, 2)), (x * x).sum((0, 1, 2))))
    np.testing.assert_allclose(program(x), plain(x), rtol=1e-4, atol=1e-5)


def test_sums_are_taken_as_formulas_again():
    """As the benchmark of single choices does for one of its candidates."""
    x = jax.random.normal(jax.random.key(0), (4, 16, 16, 32))
    program = lambda: jax.jit(lambda x: sums.square_sums(x)).lower(x).compile().as_text()  # noqa: E731
    assert ' while(' in program()
    choices.sum_by_formula()
    assert ' while(' not in program()
    assert onednn.use_onednn()
    assert ' while(' in program()
