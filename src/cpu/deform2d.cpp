// Convolutions of images with deformable kernels, deformable sampling positions or kernels of each image, and the
// gradient of images where each tap is one pixel: that is the same sum, of the gradient of the output.

#include "deform2d_kernels.h"
#include "deform2d_tile.h"

namespace kp {
namespace KP_ISA {
namespace {

// What is convolved, forward or backward: images into images.
template <class F>
struct Direction {
  PixelArray<const F> from;
  PixelArray<F> to;
  int64_t width;  // of `to`
  const F* bias;
  bool backward;
};

template <class F>
struct State {
  DepthwiseTile<F> depthwise;
  DenseTile<F> dense;
  Buffer<F> out;
};

template <class F>
Status convolve(const Images<F>& images, const Direction<F>& direction) {
  const Deform2d& a = images.args;
  const bool dense = !a.depthwise;
  ChannelOrder order, out_order;
  if (!order.make(direction.from.channels, dense ? 1 : a.kernel_groups, dense ? 1 : a.data_groups,
                  dense ? 1 : lanes<F>) ||
      !out_order.make(direction.to.channels, 1, 1, 1))
    return Status::out_of_memory;
  Kernels<F> kernels(images, order);
  const int64_t pixels = direction.to.pixels, columns = direction.to.channels / a.groups;
  const int64_t padded = round_up(columns, lanes<F>), o_row = dense ? a.groups * padded : order.stored;
  const int64_t tile_rows = dense ? rows_of_tile<F>(images.taps * direction.from.channels, o_row)
                                  : rows_of_tile<F>(0, larger<int64_t>(1, 2 * o_row));
  const Tiles tiles(pixels, tile_rows);
  const int64_t item_bytes = direction.from.pixels * order.stored * int64_t(sizeof(F));
  const int64_t kernel_bytes = images.has_item_kernels() ? kernels.size() * int64_t(sizeof(F)) : 0;
  const int64_t at_once = images_at_once(larger(item_bytes, 2 * kernel_bytes));  // kernels and their panels
  const int64_t work = images.taps * (dense ? a.channels / a.groups * a.out_channels : 4 * order.stored);
  Buffer<int64_t> slots;  // of the output's channels in a row of a tile
  if (!slots.resize(direction.to.channels)) return Status::out_of_memory;
  for (int64_t c = 0; c < direction.to.channels; ++c)
    slots[c] = dense ? c / columns * padded + c % columns : order.slot[c];
  ChannelsLast<F> copies;
  Panels<F> panels;
  if (!kernels.copy_experts(a.threads)) return Status::out_of_memory;
  for (int64_t first = 0; first < a.batch; first += at_once) {
    const int64_t count = smaller(at_once, a.batch - first);
    if (!copies.copy(direction.from, first, count, order, a.threads)) return Status::out_of_memory;
    if (first == 0 || images.has_item_kernels()) {
      const int64_t num_kernels = images.has_item_kernels() ? count : 1;
      if (!kernels.make(first, count, a.threads)) return Status::out_of_memory;
      if (dense && !panels.pack(kernels.data(), num_kernels * images.taps, a.channels, a.out_channels, a.groups,
                                direction.backward, a.threads))
        return Status::out_of_memory;
    }
    const TapFinder<F> finder{images, direction.backward};
    const auto reserve = [&](State<F>& state) {
      if (!state.out.resize((tile_rows + 1) * o_row)) return false;
      return dense ? state.dense.reserve(images, tile_rows, direction.from.channels, false)
                   : state.depthwise.reserve(images.taps);
    };
    const int threads = useful_threads(a.threads, count * pixels * work, 1 << 19);
    const Status status = for_each_of<State<F>>(count * tiles.count, threads, reserve, [&](State<F>& state, int64_t t) {
      const int64_t i = t / tiles.count, begin = tiles.begin(t % tiles.count);
      const int64_t rows = tiles.begin(t % tiles.count + 1) - begin, item = first + i;
      if (dense) {
        if (images.samples_images())
          state.dense.template fill<true>(finder, item, begin, rows, direction.width, copies.item(i));
        else
          state.dense.template fill<false>(finder, item, begin, rows, direction.width, copies.item(i));
        multiply(state.dense.rows(), tile_rows, panels, int(images.taps), state.out.data(),
                 images.has_item_kernels() ? i * images.taps : 0);
      } else {
        with_sampling(images.samples_images(), images.samples_kernels(), [&](auto with_images, auto with_kernels) {
          state.depthwise.template fill<decltype(with_images)::value, decltype(with_kernels)::value>(
              finder, order, item, begin, rows, direction.width, copies.item(i), kernels.data(i), state.out.data());
        });
      }
      write_pixels(state.out.data(), o_row, slots.data(), rows, direction.bias, direction.to, item, begin);
    });
    if (status != Status::ok) return status;
  }
  return Status::ok;
}

}  // namespace

Status deform2d(const Deform2d& args) {
  return with_real(args.x.dtype, [&](auto f) {
    using F = decltype(f);
    const Images<F> images(args);
    return convolve<F>(images, {{as<F>(args.x), args.channels, images.in_pixels, args.channels_last},
                                {into<F>(args.out), args.out_channels, images.out_pixels, args.channels_last},
                                args.out_width,
                                as<F>(args.bias),
                                false});
  });
}

Status deform2d_grad_x(const Deform2d& args) {
  return with_real(args.x.dtype, [&](auto f) {
    using F = decltype(f);
    const Images<F> images(args);
    return convolve<F>(images, {{as<F>(args.grad_out), args.out_channels, images.out_pixels, args.channels_last},
                                {into<F>(args.grad_x), args.channels, images.in_pixels, args.channels_last},
                                args.width,
                                nullptr,
                                true});
  });
}

}  // namespace KP_ISA
}  // namespace kp
