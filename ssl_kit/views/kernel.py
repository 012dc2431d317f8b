"""The fused kernel of the host executor: one image at a time through all operations, in numba.

Letters: C channels, H x W the stored image, h x w the view, K taps of the resampling filter. Stored images are uint8
HWC; inside everything is float32 and planar, one channel after the other, because planar loops vectorise.

Why it looks as it does:
- Images are given by address, so that one compiled signature serves arrays, rows of arrays and lists.
- Everything comes in as arguments: globals are frozen into numba's disk cache.
- `error_model="numpy"`, no NaN, and uint32 indices keep branches out of the inner loops; without them nothing
  vectorises (numba checks divisors and negative indices).
- Pixels are coloured in blocks of rows that fit the first-level cache; the picture is walked once before the grey mean
  of `contrast` is known and once after it.
"""

from __future__ import annotations

import math

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic

_FAST = {"nnan", "ninf", "nsz", "arcp", "contract", "reassoc"}


@intrinsic
def _pointer(typing_context, address):  # type: ignore[no-untyped-def]
    """An integer address as the void pointer that `carray` takes."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(address), generate


@njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST)
def make_views(addresses, heights, widths, channels, params, out):  # type: ignore[no-untyped-def]
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
    most_taps, widest = 2, 1
    for n in range(count):
        shrink = max(params[n, 2] / h, params[n, 3] / w)
        most_taps = max(most_taps, int(math.ceil(2 * shrink)) + 2)
        widest = max(widest, int(math.ceil(params[n, 3])) + 2)
    index_y = np.empty(h, np.uint32)
    index_x = np.empty(w, np.uint32)
    weight_y = np.empty((most_taps, h), np.float32)
    weight_x = np.empty((most_taps, w), np.float32)
    line = np.empty((channels, widest), np.float32)
    flat = np.empty(widest * channels, np.float32)
    rows = np.empty((channels, h + 3, w), np.float32)
    padded = np.empty(3 * max(h, w), np.float32)
    for n in range(count):
        image = carray(_pointer(addresses[n]), (heights[n], widths[n] * channels), np.uint8)
        p = params[n]
        flip_x = (p[4] != 0) != (p[6] == 1 or p[6] == 2)  # a turn by 1 is a mirror and a transposition
        flip_y = (p[5] != 0) != (p[6] == 2 or p[6] == 3)
        top, taps_y, covered_y = _taps(p[0], p[2], heights[n], h, flip_y, index_y, weight_y)
        left, taps_x, covered_x = _taps(p[1], p[3], widths[n], w, flip_x, index_x, weight_x)
        weight_y[:taps_y] *= np.float32(1 / 255)
        view = out[n]
        if covered_y <= h + 2:
            _across_then_down(
                image,
                top,
                left,
                covered_y,
                covered_x,
                index_y,
                weight_y[:taps_y],
                index_x,
                weight_x[:taps_x],
                line,
                rows,
                view,
            )
        else:
            _down_then_across(
                image, top, left, covered_x, index_y, weight_y[:taps_y], index_x, weight_x[:taps_x], flat, line, view
            )
        _colour(view.reshape(channels, h * w), p)
        gray = p[15] != 0 and channels == 3
        if p[16] > 0:
            _blur(view[:1] if gray else view, p[16], rows[0, :h], padded)
            if gray:
                view[1] = view[0]
                view[2] = view[0]
        if p[17] <= 1:
            flat_view = view.reshape(channels * h * w)
            threshold = p[17]
            for x in range(flat_view.size):
                flat_view[x] = 1 - flat_view[x] if flat_view[x] >= threshold else flat_view[x]
        if p[6] == 1 or p[6] == 3:
            _transpose(view)
        if p[20] > 0:
            view[:, int(p[18]) : int(p[18] + p[20]), int(p[19]) : int(p[19] + p[21])] = 0


@njit(cache=True, nogil=True, error_model="numpy")
def _taps(start, length, limit, size, flip, index, weight):  # type: ignore[no-untyped-def]
    """Fills the resampling map of one axis: a triangle filter, as Pillow's BILINEAR on the cropped box.

    Returns:
        first: the first stored pixel that the box touches.
        taps: K; output j is sum over t < K of weight[t, j] * pixel[first + index[j] + t].
        covered: how many stored pixels the box touches.
    """
    first = min(max(0, int(math.floor(start))), limit - 1)
    covered = max(1, min(limit, int(math.ceil(start + length))) - first)
    scale = float(length) / size
    support = max(1.0, scale)
    taps = 1
    for j in range(size):
        center = start - first + (j + 0.5) * scale
        low = max(0, int(center - support + 0.5))
        taps = max(taps, min(covered, int(center + support + 0.5)) - low)
    for j in range(size):
        center = start - first + (j + 0.5) * scale
        low = max(0, min(int(center - support + 0.5), covered - taps))
        target = size - 1 - j if flip else j
        total = 0.0
        for t in range(taps):
            total += max(0.0, 1.0 - abs(low + t - center + 0.5) / support)
        for t in range(taps):
            weight[t, target] = max(0.0, 1.0 - abs(low + t - center + 0.5) / support) / total
        index[target] = low
    return first, taps, covered


@njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST)
def _across_then_down(  # type: ignore[no-untyped-def]
    image, top, left, covered_y, covered_x, index_y, weight_y, index_x, weight_x, line, rows, view
):
    """Resamples when the box is not taller than the view: each stored row is spread out once, then rows are mixed."""
    channels, h, w = view.shape
    for y in range(covered_y):
        _split(image[top + y], left, covered_x, line)
        for c in range(channels):
            _gather(line[c], index_x, weight_x, rows[c, y])
    for c in range(channels):
        for y in range(h):
            low = index_y[y]
            target = view[c, y]
            if weight_y.shape[0] == 2:
                first, second = rows[c, low], rows[c, low + np.uint32(1)]
                a, b = weight_y[0, y], weight_y[1, y]
                for x in range(w):
                    target[x] = a * first[x] + b * second[x]
            else:
                target[:] = 0
                for t in range(weight_y.shape[0]):
                    source, a = rows[c, low + np.uint32(t)], weight_y[t, y]
                    for x in range(w):
                        target[x] += a * source[x]


@njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST)
def _down_then_across(  # type: ignore[no-untyped-def]
    image, top, left, covered_x, index_y, weight_y, index_x, weight_x, flat, line, view
):
    """Resamples when the box is taller than the view: stored rows are mixed first, in their own layout."""
    channels, h, w = view.shape
    length = covered_x * channels
    for y in range(h):
        low = top + index_y[y]
        flat[:length] = 0
        for t in range(weight_y.shape[0]):
            source, a = image[low + t, left * channels : left * channels + length], weight_y[t, y]
            for x in range(length):
                flat[x] += a * np.float32(source[x])
        _split(flat, 0, covered_x, line)
        for c in range(channels):
            _gather(line[c], index_x, weight_x, view[c, y])


@njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST)
def _split(row, left, covered, line):  # type: ignore[no-untyped-def]
    """Pixels (covered, C) of a row, from `left` on, to float planes (C, covered)."""
    channels = line.shape[0]
    pixels = row[left * channels : (left + covered) * channels]
    if channels == 3:  # a constant stride, which vectorises
        red, green, blue = line[0], line[1], line[2]
        for x in range(covered):
            red[x] = np.float32(pixels[3 * x])
            green[x] = np.float32(pixels[3 * x + 1])
            blue[x] = np.float32(pixels[3 * x + 2])
    else:
        for c in range(channels):
            for x in range(covered):
                line[c, x] = np.float32(pixels[x * channels + c])


@njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST)
def _gather(plane, index, weight, target):  # type: ignore[no-untyped-def]
    """target[j] = sum over t of weight[t, j] * plane[index[j] + t]."""
    if weight.shape[0] == 2:
        first, second = weight[0], weight[1]
        for j in range(target.size):
            target[j] = first[j] * plane[index[j]] + second[j] * plane[index[j] + np.uint32(1)]
    else:
        target[:] = 0
        for t in range(weight.shape[0]):
            row = weight[t]
            for j in range(target.size):
                target[j] += row[j] * plane[index[j] + np.uint32(t)]


@njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST)
def _colour(planes, p):  # type: ignore[no-untyped-def]
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
            part = planes[:, start : min(size, start + block)]
            _operations(part, p, 0, split, mean)
            total += _gray_sum(part)
        mean = np.float32(total / size)
    begin = split if split < 4 else 0
    gray = p[15] != 0 and channels == 3
    for start in range(0, size, block):
        part = planes[:, start : min(size, start + block)]
        _operations(part, p, begin, 4, mean)
        if gray:
            red, green, blue = part[0], part[1], part[2]
            for x in range(red.size):
                value = np.float32(0.2989) * red[x] + np.float32(0.587) * green[x] + np.float32(0.114) * blue[x]
                red[x] = value
                green[x] = value
                blue[x] = value


@njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST)
def _gray_sum(part):  # type: ignore[no-untyped-def]
    """Sum of the grey values of a block (C, M): torchvision's weights for RGB, the mean of the channels otherwise."""
    total = np.float32(0)
    if part.shape[0] == 3:
        red, green, blue = part[0], part[1], part[2]
        for x in range(red.size):
            total += np.float32(0.2989) * red[x] + np.float32(0.587) * green[x] + np.float32(0.114) * blue[x]
        return total
    for c in range(part.shape[0]):
        for x in range(part.shape[1]):
            total += part[c, x]
    return total / np.float32(part.shape[0])


@njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST)
def _operations(part, p, begin, end, mean):  # type: ignore[no-untyped-def]
    """The jitter's operations at the positions begin .. end - 1, on a block (C, M) in the cache."""
    one, zero = np.float32(1), np.float32(0)
    for position in range(begin, end):
        operation = int(p[11 + position])
        if operation <= 1:
            factor = p[7 + operation]
            if factor != 1:
                offset = (one - factor) * mean if operation == 1 else zero
                for c in range(part.shape[0]):
                    plane = part[c]
                    for x in range(plane.size):
                        plane[x] = min(one, max(zero, factor * plane[x] + offset))
        elif operation == 2 and p[9] != 1:
            _saturate(part[0], part[1], part[2], p[9])
        elif operation == 3 and p[10] != 0:
            _turn_hue(part[0], part[1], part[2], p[10])


@njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST)
def _saturate(red, green, blue, factor):  # type: ignore[no-untyped-def]
    one, zero = np.float32(1), np.float32(0)
    rest = one - factor
    for x in range(red.size):
        r, g, b = red[x], green[x], blue[x]
        gray = rest * (np.float32(0.2989) * r + np.float32(0.587) * g + np.float32(0.114) * b)
        red[x] = min(one, max(zero, factor * r + gray))
        green[x] = min(one, max(zero, factor * g + gray))
        blue[x] = min(one, max(zero, factor * b + gray))


@njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST)
def _turn_hue(red, green, blue, turns):  # type: ignore[no-untyped-def]
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


@njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST)
def _blur(planes, sigma, across, padded):  # type: ignore[no-untyped-def]
    """Separable Gaussian up to 3 sigma with mirrored borders, as torchvision's `gaussian_blur`; planes (C, h, w)."""
    channels, h, w = planes.shape
    radius_x = min(int(math.ceil(3 * sigma)), w - 1)
    radius_y = min(int(math.ceil(3 * sigma)), h - 1)
    kernel_x = _gaussian(sigma, radius_x)
    kernel_y = _gaussian(sigma, radius_y)
    for c in range(channels):
        plane = planes[c]
        for y in range(h):
            source, target = plane[y], across[y]
            padded[radius_x : radius_x + w] = source
            for x in range(1, radius_x + 1):
                padded[radius_x - x] = source[x]
                padded[radius_x + w - 1 + x] = source[w - 1 - x]
            for x in range(w):
                target[x] = kernel_x[0] * padded[radius_x + x]
            for t in range(1, radius_x + 1):
                left, right, k = padded[radius_x - t :], padded[radius_x + t :], kernel_x[t]
                for x in range(w):
                    target[x] += k * (left[x] + right[x])
        for y in range(h):
            source, target = across[y], plane[y]
            for x in range(w):
                target[x] = kernel_y[0] * source[x]
            for t in range(1, radius_y + 1):
                above = across[abs(y - t)]
                below = across[h - 1 - abs(h - 1 - y - t)]
                k = kernel_y[t]
                for x in range(w):
                    target[x] += k * (above[x] + below[x])


@njit(cache=True, nogil=True, error_model="numpy")
def _gaussian(sigma, radius):  # type: ignore[no-untyped-def]
    """Half of a normalised Gaussian: entry t is the weight of the pixels at distance t."""
    kernel = np.empty(radius + 1, np.float32)
    total = 0.0
    for t in range(radius + 1):
        value = math.exp(-0.5 * (t / sigma) ** 2)
        kernel[t] = value
        total += value if t == 0 else 2 * value
    for t in range(radius + 1):
        kernel[t] /= total
    return kernel


@njit(cache=True, nogil=True, error_model="numpy")
def _transpose(planes):  # type: ignore[no-untyped-def]
    for c in range(planes.shape[0]):
        plane = planes[c]
        for y in range(plane.shape[0]):
            for x in range(y):
                plane[y, x], plane[x, y] = plane[x, y], plane[y, x]
