"""The fused kernel of the host executor: one image at a time through all operations, in numba.

Letters: C channels, H x W the stored image, h x w the view, K taps of the resampling filter. Stored images are uint8
HWC; inside everything is float32. Resampling works on interleaved pixels, because one tap then is one load of all
channels; what follows works on planes, one channel after the other, because such loops vectorise.

Why it looks as it does:
- Images are given by address, so that one compiled signature serves arrays, rows of arrays and lists.
- Everything comes in as arguments: globals are frozen into numba's disk cache.
- Inner loops run over whole one-dimensional C-contiguous slices. A row of a two-dimensional slice has a stride that
  the compiler does not know, and the colour operations ran eight times slower on it.
- `error_model="numpy"`, no NaN, and unsigned computed indices keep branches out of the inner loops (numba checks
  divisors and negative indices), without which nothing vectorises.
- Only the outermost function is cached and gets Python wrappers: 13 s of compilation became 6.
"""

# ruff: noqa: PLR0917, PLW3301, RUF046  (nested two-argument min and max, and explicit int(), compile to better code)

from __future__ import annotations

import math

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic

_inner = njit(
    error_model="numpy",
    fastmath={"nnan", "ninf", "nsz", "arcp", "contract", "reassoc"},
    no_cpython_wrapper=True,
    no_cfunc_wrapper=True,
)


@intrinsic
def _pointer(typing_context, address):
    """An integer address as the void pointer that `carray` takes."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(address), generate


@njit(cache=True, nogil=True, error_model="numpy")
def make_views(addresses, heights, widths, channels, params, out):
    """Makes one view per image.

    Args:
        addresses: (N,) int64, of uint8 C-contiguous (H_i, W_i, C) images.
        heights: (N,) int64.
        widths: (N,) int64.
        channels: C.
        params: (N, COLUMNS) float32, see `ssl_kit.views.sample`.
        out: (N, C, h, w) float32, written, in [0, 1].
    """
    count, _, h, w = out.shape
    most_taps, widest, largest_sigma = 2, 1, 0.0
    for n in range(count):
        shrink = max(params[n, 2] / h, params[n, 3] / w)
        most_taps = max(most_taps, int(math.ceil(2 * shrink)) + 2)
        widest = max(widest, int(math.ceil(params[n, 3])) + 2)
        largest_sigma = max(largest_sigma, params[n, 16])
    scratch = (
        np.empty(h, np.uint32),
        np.empty((h, most_taps), np.float32),
        np.empty(w, np.uint32),
        np.empty((w, most_taps), np.float32),
        np.zeros((widest + 2) * channels, np.float32),
        np.zeros((h + 3, w * channels + 1), np.float32),  # one more: the three-channel loop writes four
    )
    border = max(2, int(math.ceil(3 * largest_sigma)) + 1)
    blurred = np.zeros((2, (h + 2 * border) * (w + 2 * border)), np.float32)
    for n in range(count):
        image = carray(_pointer(addresses[n]), (heights[n], widths[n] * channels), np.uint8)
        p, view = params[n], out[n]
        _resample(image, p, scratch, view)
        _colour(view.reshape(channels, h * w), p)
        if p[16] > 0:
            gray = p[15] != 0 and channels == 3
            _blur(view, 1 if gray else channels, p[16], blurred[0], blurred[1])
            if gray:
                view[1] = view[0]
                view[2] = view[0]
        if p[17] <= 1:
            _solarize(view.reshape(channels * h * w), p[17])
        if p[6] == 1 or p[6] == 3:
            _transpose(view)
        if p[20] > 0:
            view[:, int(p[18]) : int(p[18] + p[20]), int(p[19]) : int(p[19] + p[21])] = 0


@_inner
def _resample(image, p, scratch, view):
    """Crop, resize and mirrors: image (H, W * C) uint8 to view (C, h, w)."""
    index_y, weight_y, index_x, weight_x, flat, rows = scratch
    channels, h, w = view.shape
    flip_x = (p[4] != 0) != (p[6] == 1 or p[6] == 2)  # a quarter turn is a mirror and a transposition
    flip_y = (p[5] != 0) != (p[6] == 2 or p[6] == 3)
    height, width = image.shape[0], image.shape[1] // channels
    top, taps_y, covered_y = _taps(p[0], p[2], height, flip_y, 1, 1 / 255, index_y, weight_y)
    left, taps_x, covered_x = _taps(p[1], p[3], width, flip_x, channels, 1.0, index_x, weight_x)
    left *= channels
    length = covered_x * channels
    if covered_y <= h + 2:  # each stored row is spread out once, then rows are mixed
        for y in range(covered_y):
            source = image[top + y][left : left + length]
            for x in range(length):
                flat[x] = np.float32(source[x])
            _across(flat, index_x, weight_x, taps_x, channels, rows[y])
        mixed = flat if flat.size >= w * channels else np.empty(w * channels, np.float32)
        for y in range(h):
            low = index_y[y]
            _mix(rows, low, weight_y[y], taps_y, mixed, w * channels)
            _split(mixed, y, view)
    else:  # stored rows are mixed first
        for y in range(h):
            low = top + index_y[y]
            flat[:length] = 0
            for t in range(taps_y):
                source, a = image[low + t][left : left + length], weight_y[y, t]
                for x in range(length):
                    flat[x] += a * np.float32(source[x])
            _across(flat, index_x, weight_x, taps_x, channels, rows[0])
            _split(rows[0], y, view)


@_inner
def _taps(start, length, limit, flip, step, gain, index, weight):
    """Fills the resampling map of one axis: a triangle filter, as Pillow's BILINEAR on the cropped box.

    Returns:
        first: the first stored pixel that the box touches.
        taps: K; output j is the sum over t < K of weight[j, t] * pixel[first + index[j] / step + t].
        covered: how many stored pixels the box touches.
    """
    size = index.size
    first = min(max(0, int(math.floor(start))), limit - 1)
    covered = max(1, min(limit, int(math.ceil(start + length))) - first)
    scale = float(length) / size
    offset = float(start) - first
    if scale <= 1:
        for j in range(size):
            center = max(0.0, offset + (j + 0.5) * scale - 0.5)
            low = min(int(center), max(0, covered - 2))
            second = min(center - low, 1.0 if covered > 1 else 0.0)
            target = size - 1 - j if flip else j
            index[target] = low * step
            weight[target, 0] = (1 - second) * gain
            weight[target, 1] = second * gain
        return first, 2, covered
    taps = 1
    for j in range(size):
        center = offset + (j + 0.5) * scale
        taps = max(taps, min(covered, int(center + scale + 0.5)) - max(0, int(center - scale + 0.5)))
    for j in range(size):
        center = offset + (j + 0.5) * scale
        low = max(0, min(int(center - scale + 0.5), covered - taps))
        target = size - 1 - j if flip else j
        total = 0.0
        for t in range(taps):
            total += max(0.0, 1.0 - abs(low + t - center + 0.5) / scale)
        for t in range(taps):
            weight[target, t] = max(0.0, 1.0 - abs(low + t - center + 0.5) / scale) / total * gain
        index[target] = low * step
    return first, taps, covered


@_inner
def _across(flat, index, weight, taps, channels, target):
    """Resamples one interleaved row: target[j * C + c] = sum over t of weight[j, t] * flat[index[j] + t * C + c]."""
    if channels == 3 and taps == 2:
        # four lanes, the last overwritten by the next pixel: loads, sum and store become one vector each
        one, two, three = np.uint64(1), np.uint64(2), np.uint64(3)
        for j in range(index.size):
            i, a, b = np.uint64(index[j]), weight[j, 0], weight[j, 1]
            o = np.uint64(j) * three
            p0, p1, p2, p3 = flat[i], flat[i + one], flat[i + two], flat[i + three]
            q0, q1 = flat[i + three], flat[i + np.uint64(4)]
            q2, q3 = flat[i + np.uint64(5)], flat[i + np.uint64(6)]
            p0, p1, p2, p3 = a * p0 + b * q0, a * p1 + b * q1, a * p2 + b * q2, a * p3 + b * q3
            target[o] = p0
            target[o + one] = p1
            target[o + two] = p2
            target[o + three] = p3
    elif channels == 3:
        one, two, three = np.uint64(1), np.uint64(2), np.uint64(3)
        for j in range(index.size):
            i, o = np.uint64(index[j]), np.uint64(j) * three
            p0, p1, p2, p3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            for t in range(taps):
                a = weight[j, t]
                p0 += a * flat[i]
                p1 += a * flat[i + one]
                p2 += a * flat[i + two]
                p3 += a * flat[i + three]
                i += three
            target[o] = p0
            target[o + one] = p1
            target[o + two] = p2
            target[o + three] = p3
    else:
        for j in range(index.size):
            for c in range(channels):
                total = np.float32(0)
                for t in range(taps):
                    total += weight[j, t] * flat[index[j] + t * channels + c]
                target[j * channels + c] = total


@_inner
def _mix(rows, low, weight, taps, mixed, length):
    """mixed[x] = sum over t of weight[t] * rows[low + t, x]."""
    first, second, a, b = rows[low], rows[low + np.uint32(1)], weight[0], weight[1]
    for x in range(length):
        mixed[x] = a * first[x] + b * second[x]
    for t in range(2, taps):
        first, a = rows[low + np.uint32(t)], weight[t]
        for x in range(length):
            mixed[x] += a * first[x]


@_inner
def _split(row, y, view):
    """Interleaved pixels of one row to row y of the planes."""
    channels, _, w = view.shape
    if channels == 3:  # a constant stride, which vectorises
        red, green, blue = view[0, y], view[1, y], view[2, y]
        three, one, two = np.uint64(3), np.uint64(1), np.uint64(2)
        for x in range(w):
            i = np.uint64(x) * three
            red[x] = row[i]
            green[x] = row[i + one]
            blue[x] = row[i + two]
    else:
        for c in range(channels):
            for x in range(w):
                view[c, y, x] = row[x * channels + c]


@_inner
def _colour(planes, p):
    """Jitter in its drawn order with a clamp after each operation, then the loss of colour; planes (C, h * w)."""
    channels, size = planes.shape
    split = 4  # position of contrast; what stands before it runs before the mean is taken
    for position in range(4):
        if p[11 + position] == 1 and p[8] != 1:
            split = position
    mean = np.float32(0)
    block = 1024
    if split < 4:
        total = 0.0
        for start in range(0, size, block):
            stop = min(size, start + block)
            _operations(planes, start, stop, p, 0, split, mean)
            total += _gray_sum(planes, start, stop)
        mean = np.float32(total / size)
    begin = split if split < 4 else 0
    gray = p[15] != 0 and channels == 3
    for start in range(0, size, block):
        stop = min(size, start + block)
        _operations(planes, start, stop, p, begin, 4, mean)
        if gray:
            _drop_colour(planes[0][start:stop], planes[1][start:stop], planes[2][start:stop])


@_inner
def _drop_colour(red, green, blue):
    for x in range(red.size):
        value = np.float32(0.2989) * red[x] + np.float32(0.587) * green[x] + np.float32(0.114) * blue[x]
        red[x] = value
        green[x] = value
        blue[x] = value


@_inner
def _gray_sum(planes, start, stop):
    """Sum of the grey values of a block: torchvision's weights for RGB, the mean of the channels otherwise."""
    total = np.float32(0)
    if planes.shape[0] == 3:
        red, green, blue = planes[0][start:stop], planes[1][start:stop], planes[2][start:stop]
        for x in range(red.size):
            total += np.float32(0.2989) * red[x] + np.float32(0.587) * green[x] + np.float32(0.114) * blue[x]
        return total
    for c in range(planes.shape[0]):
        plane = planes[c][start:stop]
        for x in range(plane.size):
            total += plane[x]
    return total / np.float32(planes.shape[0])


@_inner
def _operations(planes, start, stop, p, begin, end, mean):
    """The jitter's operations at the positions begin .. end - 1, on the pixels start .. stop - 1 (in the cache)."""
    for position in range(begin, end):
        operation = int(p[11 + position])
        if operation <= 1:
            factor = p[7 + operation]
            if factor != 1:
                offset = (np.float32(1) - factor) * mean if operation == 1 else np.float32(0)
                for c in range(planes.shape[0]):
                    _scale(planes[c][start:stop], factor, offset)
        elif operation == 2 and p[9] != 1:
            _saturate(planes[0][start:stop], planes[1][start:stop], planes[2][start:stop], p[9])
        elif operation == 3 and p[10] != 0:
            _turn_hue(planes[0][start:stop], planes[1][start:stop], planes[2][start:stop], p[10])


@_inner
def _scale(plane, factor, offset):
    for x in range(plane.size):
        plane[x] = min(np.float32(1), max(np.float32(0), factor * plane[x] + offset))


@_inner
def _saturate(red, green, blue, factor):
    one, zero = np.float32(1), np.float32(0)
    rest = one - factor
    for x in range(red.size):
        r, g, b = red[x], green[x], blue[x]
        gray = rest * (np.float32(0.2989) * r + np.float32(0.587) * g + np.float32(0.114) * b)
        red[x] = min(one, max(zero, factor * r + gray))
        green[x] = min(one, max(zero, factor * g + gray))
        blue[x] = min(one, max(zero, factor * b + gray))


@_inner
def _turn_hue(red, green, blue, turns):
    """HSV with the hue moved by `turns` and back, exact, without a branch.

    With value v = max, chroma d = max - min and hue k in sixths of the circle, the colour of HSV is
    channel(n) = v - d * clip(min(m, 4 - m), 0, 1) with m = (n + k) mod 6 and n = 5, 3, 1 for red, green, blue.
    """
    one, zero, six = np.float32(1), np.float32(0), np.float32(6)
    shift = six * turns + six  # the sum below stays positive, so that one or two subtractions are the modulus
    for x in range(red.size):
        r, g, b = red[x], green[x], blue[x]
        high = max(r, max(g, b))
        chroma = high - min(r, min(g, b))
        scale = one / chroma if chroma > zero else zero
        hue = np.float32(4) + (r - g) * scale
        hue = np.float32(2) + (b - r) * scale if high == g else hue
        hue = (g - b) * scale if high == r else hue
        hue += shift  # in [2, 14)
        hue = hue - six if hue >= six else hue
        hue = hue - six if hue >= six else hue
        for_red = hue + np.float32(5)
        for_red = for_red - six if for_red >= six else for_red
        for_green = hue + np.float32(3)
        for_green = for_green - six if for_green >= six else for_green
        for_blue = hue + one
        for_blue = for_blue - six if for_blue >= six else for_blue
        red[x] = high - chroma * min(one, max(zero, min(for_red, np.float32(4) - for_red)))
        green[x] = high - chroma * min(one, max(zero, min(for_green, np.float32(4) - for_green)))
        blue[x] = high - chroma * min(one, max(zero, min(for_blue, np.float32(4) - for_blue)))


@_inner
def _blur(view, channels, sigma, padded, across):
    """Separable Gaussian up to 3 sigma with mirrored borders, as torchvision's `gaussian_blur`; in place.

    Works on a copy with `border` mirrored pixels on each side, so that both passes are plain sums of shifted copies of
    one long array, cut into blocks that fit the cache; what it computes for the border columns is not used.
    """
    _, h, w = view.shape
    radius = int(math.ceil(3 * sigma))
    radius_x, radius_y = min(radius, w - 1), min(radius, h - 1)
    kernel_x, kernel_y = _gaussian(sigma, radius_x), _gaussian(sigma, radius_y)
    border = max(kernel_x.size, kernel_y.size) - 1  # even
    stride = w + 2 * border
    begin, end = border * stride, (border + h) * stride
    for c in range(channels):
        for y in range(h):
            source, target = view[c, y], padded[(border + y) * stride :]
            inner = target[border:]
            for x in range(w):
                inner[x] = source[x]
            for x in range(1, radius_x + 1):
                target[border - x] = source[x]
                inner[w - 1 + x] = source[w - 1 - x]
        _convolve(padded, across, begin, end, 1, kernel_x)
        for y in range(1, radius_y + 1):
            _copy(across[(border + y) * stride :], across[(border - y) * stride :], stride)
            _copy(across[(border + h - 1 - y) * stride :], across[(border + h - 1 + y) * stride :], stride)
        _convolve(across, padded, begin, end, stride, kernel_y)
        for y in range(h):
            _copy(padded[(border + y) * stride + border :], view[c, y], w)


@_inner
def _convolve(source, target, begin, end, step, kernel):
    """target[i] = sum over t of kernel[|t|] * source[i + t * step] for begin <= i < end, two distances at a time."""
    for start in range(begin, end, 2048):
        stop = min(end, start + 2048)
        goal, centre = target[start:stop], source[start:stop]
        k = kernel[0]
        for t in range(1, kernel.size, 2):
            a, b = kernel[t], kernel[t + 1]
            left, right = source[start - t * step :], source[start + t * step :]
            lefter, righter = source[start - (t + 1) * step :], source[start + (t + 1) * step :]
            if t == 1:
                for x in range(goal.size):
                    goal[x] = k * centre[x] + a * (left[x] + right[x]) + b * (lefter[x] + righter[x])
            else:
                for x in range(goal.size):
                    goal[x] += a * (left[x] + right[x]) + b * (lefter[x] + righter[x])


@_inner
def _copy(source, target, count):
    for x in range(count):
        target[x] = source[x]


@_inner
def _gaussian(sigma, radius):
    """Half of a normalised Gaussian: entry t is the weight at distance t; an odd number of entries, at least three."""
    kernel = np.zeros(max(3, radius + 1 + radius % 2), np.float32)
    total = 0.0
    for t in range(radius + 1):
        value = math.exp(-0.5 * (t / sigma) ** 2)
        kernel[t] = value
        total += value if t == 0 else 2 * value
    for t in range(radius + 1):
        kernel[t] /= total
    return kernel


@_inner
def _solarize(values, threshold):
    for x in range(values.size):
        values[x] = 1 - values[x] if values[x] >= threshold else values[x]


@_inner
def _transpose(planes):
    for c in range(planes.shape[0]):
        plane = planes[c]
        for y in range(plane.shape[0]):
            for x in range(y):
                plane[y, x], plane[x, y] = plane[x, y], plane[y, x]
