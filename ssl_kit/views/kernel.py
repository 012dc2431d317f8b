"""The fused kernel of the host executor: one image at a time through all operations, in numba.

Letters: C channels, H x W the stored image, h x w the view, K taps of the resampling filter. Stored images are uint8
or uint16 HWC; inside everything is float32. Resampling works on interleaved pixels, because one tap then is one load of
all channels; what follows works on planes, one channel after the other, because such loops vectorise.

Why it looks as it does:
- Images are given by address, so that one compiled signature serves arrays, rows of arrays and lists.
- Everything comes in as arguments, and all helpers are here: numba's cache holds old globals and sees this file only.
- Inner loops run over whole 1-D C-contiguous slices: a row of a 2-D one, of unknown stride, is eight times slower.
- `error_model="numpy"`, no NaN, unsigned computed indices: branches in the inner loops would stop vectorisation.
- Compilation is kept short: only the outermost function is cached and gets Python wrappers, every helper is called
  from one place (the compiler copies it into each), and nothing here allocates, reshapes or assigns to slices.
"""

# ruff: noqa: PLW3301, RUF046  (nested two-argument min and max, and explicit int(), compile to better code)

from __future__ import annotations

import math

import numpy as np
from numba import carray, njit

from ssl_kit.views.kernel_cache import cached, pointer

_FAST = {"nnan", "ninf", "nsz", "arcp", "contract", "reassoc"}
_inner = njit(error_model="numpy", fastmath=_FAST, no_cpython_wrapper=True, no_cfunc_wrapper=True)  # type: ignore[call-overload]


@cached
def make_views(addresses, heights, widths, params, h, w, scratch, out, kind):
    """Makes one view per image.

    Args:
        addresses: (N,) int64, of C-contiguous (H_i, W_i, C) images.
        heights: (N,) int64.
        widths: (N,) int64.
        params: (N, COLUMNS) float32, or with the columns of each channel; see `ssl_kit.views.sample`.
        h: height of the views.
        w: width of the views.
        scratch: what the call works in; see `_scratch` in `ssl_kit/views/host.py`.
        out: (N, C, h * w) float32, written, in [0, 1].
        kind: an empty array of the images' type, uint8 or uint16; each is compiled when it is first met.
    """
    maps, buffers = scratch
    channels = out.shape[1]
    gain = 1 / np.iinfo(kind.dtype).max
    for n in range(out.shape[0]):
        address: int = pointer(addresses[n])  # type: ignore[call-arg]
        image = carray(address, (heights[n], widths[n] * channels), kind.dtype)
        p, planes = params[n], out[n]
        _resample(image, p, h, w, gain, maps, buffers[0], planes)
        apart = p.size > 22  # each channel has its own brightness and contrast
        for c in range(channels if apart else 1):
            _colour(planes[c : c + 1 if apart else channels], p, 23 + 2 * c if apart else 7)
        if apart and p[22] >= 0:
            plane = planes[int(p[22])]
            for x in range(plane.size):
                plane[x] = np.float32(0)
        if p[16] > 0:
            _blur(planes, p, h, w, buffers)
        if p[17] <= 1:
            _solarize(planes, p[17])
        if p[6] == 1 or p[6] == 3:
            _transpose(planes, w)
        if p[20] > 0:
            _erase(planes, w, int(p[18]), int(p[19]), int(p[20]), int(p[21]))


@_inner
def _resample(image, p, h, w, gain, maps, flat, planes):
    """Crop, resize and mirrors: image (H, W * C) to planes (C, h * w); the values are multiplied by `gain`."""
    box, index, weight, rows = maps
    channels = planes.shape[0]
    for axis in range(2):
        turned = p[6] == 2 or p[6] == (3 if axis == 0 else 1)  # a quarter turn is a mirror and a transposition
        flip = (p[5 - axis] != 0) != turned
        step, size, share = (channels, w, 1.0) if axis else (1, h, gain)
        limit = image.shape[axis] // step
        _taps(p[axis], p[2 + axis], limit, flip, step, share, box[axis], index[axis][:size], weight[axis])
    top, taps_y, covered_y = box[0, 0], box[0, 1], box[0, 2]
    left, taps_x, length = box[1, 0] * channels, box[1, 1], box[1, 2] * channels
    spread_first = covered_y <= h + 2  # spread out each stored row once, then mix rows; else mix stored rows first
    for y in range(covered_y if spread_first else h):
        low = top + (y if spread_first else index[0, y])
        for t in range(1 if spread_first else taps_y):
            source, a = image[low + t][left : left + length], np.float32(1) if spread_first else weight[0, y, t]
            if t == 0:
                for x in range(length):
                    flat[x] = a * np.float32(source[x])
            else:
                for x in range(length):
                    flat[x] += a * np.float32(source[x])
        if taps_x == 2:  # a constant that the compiler unrolls: 1.6 times faster than the general loop
            _across(flat, index[1][:w], weight[1], 2, channels, rows[y])
        else:
            _across(flat, index[1][:w], weight[1], taps_x, channels, rows[y])
    for y in range(h):
        mixed = rows[y]
        if spread_first:
            _mix(rows, index[0, y], weight[0, y], taps_y, flat, w * channels)
            mixed = flat
        _split(mixed, y * w, w, planes)


@_inner
def _taps(start, length, limit, flip, step, gain, box, index, weight):
    """Fills the resampling map of one axis: a triangle filter, as Pillow's BILINEAR on the cropped box.

    Writes to `box` the first stored pixel that the box touches, the taps K and how many pixels it touches; output j is
    the sum over t < K of weight[j, t] * pixel[first + index[j] / step + t]. The weights add up to `gain`.
    """
    size = index.size
    first = min(max(0, int(math.floor(start))), limit - 1)
    covered = max(1, min(limit, int(math.ceil(start + length))) - first)
    scale = length / np.float64(size)
    offset = start - np.float64(first)
    taps = min(2, covered)
    if scale > 1:
        taps = 1
        for j in range(size):
            center = offset + (j + 0.5) * scale
            taps = max(taps, min(covered, int(center + scale + 0.5)) - max(0, int(center - scale + 0.5)))
    box[0], box[1], box[2] = first, taps, covered
    for j in range(size):
        target = size - 1 - j if flip else j
        if scale <= 1:
            center = max(0.0, offset + (j + 0.5) * scale - 0.5)
            low = min(int(center), max(0, covered - 2))
            second = min(center - low, 1.0 if covered > 1 else 0.0)
            weight[target, 0] = (1 - second) * gain
            weight[target, 1] = second * gain
        else:
            center = offset + (j + 0.5) * scale - 0.5
            low = max(0, min(int(center - scale + 1), covered - taps))
            total = 0.0
            for t in range(taps):
                value = max(0.0, scale - abs(low + t - center))
                weight[target, t] = value
                total += value
            for t in range(taps):
                weight[target, t] *= gain / total
        index[target] = low * step


@_inner
def _across(flat, index, weight, taps, channels, target):
    """Resamples one interleaved row: target[j * C + c] = sum over t of weight[j, t] * flat[index[j] + t * C + c]."""
    one, two, three = np.uint64(1), np.uint64(2), np.uint64(3)  # unsigned: no check for negative indices
    for j in range(index.size if channels == 3 else 0):
        # four lanes, the last overwritten by the next pixel: loads, sum and store become one vector each
        i, o, a = np.uint64(index[j]), np.uint64(j) * three, weight[j, 0]
        p0, p1, p2, p3 = a * flat[i], a * flat[i + one], a * flat[i + two], a * flat[i + three]
        for t in range(1, taps):
            i, a = i + three, weight[j, t]
            p0 += a * flat[i]
            p1 += a * flat[i + one]
            p2 += a * flat[i + two]
            p3 += a * flat[i + three]
        target[o], target[o + one], target[o + two], target[o + three] = p0, p1, p2, p3
    for j in range(0 if channels == 3 else index.size):
        for c in range(channels):
            total = np.float32(0)
            for t in range(taps):
                total += weight[j, t] * flat[index[j] + t * channels + c]
            target[j * channels + c] = total


@_inner
def _mix(rows, low, weight, taps, mixed, length):
    """mixed[x] = sum over t of weight[t] * rows[low + t, x]."""
    for t in range(0, taps, 2):
        first, a = rows[low + np.uint32(t)], weight[t]
        second, b = (rows[low + np.uint32(t + 1)], weight[t + 1]) if t + 1 < taps else (first, np.float32(0))
        if t == 0:
            for x in range(length):
                mixed[x] = a * first[x] + b * second[x]
        else:
            for x in range(length):
                mixed[x] += a * first[x] + b * second[x]


@_inner
def _split(row, start, w, planes):
    """Interleaved pixels of one row to the planes, from pixel `start` on."""
    channels = planes.shape[0]
    if channels == 3:  # a constant stride, which vectorises
        red, green, blue = planes[0][start:], planes[1][start:], planes[2][start:]
        three, one, two = np.uint64(3), np.uint64(1), np.uint64(2)
        for x in range(w):
            i = np.uint64(x) * three
            red[x], green[x], blue[x] = row[i], row[i + one], row[i + two]
    else:
        for c in range(channels):
            for x in range(w):
                planes[c, start + x] = row[x * channels + c]


@_inner
def _colour(planes, p, at):
    """Jitter in its drawn order with a clamp after each operation, then the loss of colour; planes (C, h * w).

    Brightness and contrast are the columns `at` and `at + 1`.
    """
    channels, size = planes.shape
    contrast, gray = p[at + 1] != 1, p[15] != 0 and channels == 3
    split = 0  # position of contrast: what stands before it is done before the mean is taken
    for position in range(4):
        split = position if contrast and p[11 + position] == 1 else split
    total, mean = 0.0, np.float32(0)
    for last in range(0 if contrast else 1, 2):
        for start in range(0, size, 1024):
            stop = min(size, start + 1024)
            _operations(planes, start, stop, p, at, split if last else 0, 4 if last else split, mean)
            if not last:
                total += _gray_sum(planes, start, stop)
            elif gray:
                _drop_colour(planes[0][start:stop], planes[1][start:stop], planes[2][start:stop])
        mean = np.float32(total / size)


@_inner
def _drop_colour(red, green, blue):
    for x in range(red.size):
        value = np.float32(0.2989) * red[x] + np.float32(0.587) * green[x] + np.float32(0.114) * blue[x]
        red[x], green[x], blue[x] = value, value, value


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
def _operations(planes, start, stop, p, at, begin, end, mean):
    """The jitter's operations at the positions begin .. end - 1, on the pixels start .. stop - 1 (in the cache)."""
    for position in range(begin, end):
        operation = int(p[11 + position])
        if operation <= 1:
            factor = p[at + operation]
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
    one, zero, rest = np.float32(1), np.float32(0), np.float32(1) - factor
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
    shift = six * turns + six  # keeps the sum positive, so that one or two subtractions are the modulus
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
        red[x] = _channel(high, chroma, hue + np.float32(5))
        green[x] = _channel(high, chroma, hue + np.float32(3))
        blue[x] = _channel(high, chroma, hue + one)


@_inner
def _channel(high, chroma, m):
    m = m - np.float32(6) if m >= np.float32(6) else m
    return high - chroma * min(np.float32(1), max(np.float32(0), min(m, np.float32(4) - m)))


@_inner
def _blur(planes, p, h, w, buffers):
    """Separable Gaussian up to 3 sigma with mirrored borders, as torchvision's `gaussian_blur`; in place.

    Works on a copy with `border` mirrored pixels on each side, so that both passes are plain sums of shifted copies of
    one long array, cut into blocks that fit the cache; what it computes for the border columns is not used. A gray
    view is blurred once.
    """
    radius = int(math.ceil(3 * p[16]))
    border = radius + radius % 2  # distances are taken in pairs
    stride = w + 2 * border
    begin, end = border * stride, (border + h) * stride
    gray = p[15] != 0 and planes.shape[0] == 3
    for c in range(1 if gray else planes.shape[0]):
        plane = planes[c]
        for y in range(h):
            source, target = plane[y * w :], buffers[0][(border + y) * stride :]
            inner = target[border:]
            for x in range(w):
                inner[x] = source[x]
            for x in range(1, border + 1):  # beyond the reach the weights are 0, but 0 times garbage may be NaN
                target[border - x] = source[x] if x < w else np.float32(0)
                inner[w - 1 + x] = source[w - 1 - x] if x < w else np.float32(0)
        for axis in range(2):
            source, target = buffers[axis], buffers[1 - axis]
            step = stride if axis else 1
            reach = min(radius, (h if axis else w) - 1)
            for y in range(1, border + 1 if axis else 1):
                for below in range(2):
                    edge = begin if below == 0 else end - stride
                    inside = source[edge + (1 - 2 * below) * min(y, h - 1) * stride :]
                    beyond = source[edge - (1 - 2 * below) * y * stride :]
                    for x in range(stride):
                        beyond[x] = inside[x]
            _convolve(source, target, begin, end, step, p[16], reach)
        for y in range(h):
            source, target = buffers[0][(border + y) * stride + border :], plane[y * w :]
            for x in range(w):
                target[x] = source[x]
    for c in range(1, 3 if gray else 1):
        source, target = planes[0], planes[c]
        for x in range(source.size):
            target[x] = source[x]


@_inner
def _convolve(source, target, begin, end, step, sigma, reach):
    """target[i] = sum over |t| <= reach of g(t) * source[i + t * step] for begin <= i < end; g is a Gaussian, sum 1."""
    total = 1.0
    for t in range(1, reach + 1):
        total += 2 * math.exp(-0.5 * (t / sigma) ** 2)
    k = np.float32(1 / total)
    for t in range(1, max(2, reach + 1), 2):  # two distances at a time; the second may lie beyond the reach
        a = np.float32(math.exp(-0.5 * (t / sigma) ** 2) / total) if t <= reach else np.float32(0)
        b = np.float32(math.exp(-0.5 * ((t + 1) / sigma) ** 2) / total) if t < reach else np.float32(0)
        for start in range(begin, end, 2048):
            goal, centre = target[start : min(end, start + 2048)], source[start:]
            left, right = source[start - t * step :], source[start + t * step :]
            lefter, righter = source[start - (t + 1) * step :], source[start + (t + 1) * step :]
            if t == 1:
                for x in range(goal.size):
                    goal[x] = k * centre[x] + a * (left[x] + right[x]) + b * (lefter[x] + righter[x])
            else:
                for x in range(goal.size):
                    goal[x] += a * (left[x] + right[x]) + b * (lefter[x] + righter[x])


@_inner
def _solarize(planes, threshold):
    for c in range(planes.shape[0]):
        plane = planes[c]
        for x in range(plane.size):
            plane[x] = np.float32(1) - plane[x] if plane[x] >= threshold else plane[x]


@_inner
def _transpose(planes, w):
    for c in range(planes.shape[0]):
        plane = planes[c]
        for y in range(w):
            for x in range(y):
                plane[y * w + x], plane[x * w + y] = plane[x * w + y], plane[y * w + x]


@_inner
def _erase(planes, w, top, left, height, width):
    for c in range(planes.shape[0]):
        for y in range(top, top + height):
            for x in range(left, left + width):
                planes[c, y * w + x] = 0
