// oneDNN's convolutions, called by XLA (jax.ffi): images [n, h, w, c], kernels [k, k, c, o].
//
// A call is split over its images, and XLA's own threads take the parts. On each of them oneDNN uses
// that thread alone, so that no other threads stand beside XLA's.

#include <algorithm>
#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "dnnl.hpp"
#include "xla/ffi/api/ffi.h"

extern "C" {
int omp_get_max_threads();
void omp_set_num_threads(int threads);
}

namespace {

namespace ffi = xla::ffi;
using dnnl::memory;

enum Pass : int64_t { kForward, kToImages, kToKernel };

// What a primitive is made for: a pass of a convolution of n images of one type.
struct Problem {
  int64_t pass, type, n, h, w, c, k, o, rows, columns, stride, padding;
  bool operator<(const Problem& other) const { return Tie() < other.Tie(); }

 private:
  std::array<int64_t, 12> Tie() const {
    return {pass, type, n, h, w, c, k, o, rows, columns, stride, padding};
  }
};

struct Primitive {
  dnnl::primitive run;
  memory::desc images, results;
  // The kernel as it is given or returned, and as oneDNN wants it.
  memory::desc plain_kernel, kernel;
  memory::desc scratchpad;
};

// Has oneDNN stay on this thread; what else of the process runs on it later has its threads back.
class Alone {
 public:
  Alone() : before_(omp_get_max_threads()) { omp_set_num_threads(1); }
  ~Alone() { omp_set_num_threads(before_); }

 private:
  const int before_;
};

const dnnl::engine& Engine() {
  static const auto* engine = new dnnl::engine(dnnl::engine::kind::cpu, 0);
  return *engine;
}

Primitive Make(const Problem& p) {
  using tag = memory::format_tag;
  const auto type = static_cast<memory::data_type>(p.type);
  // Sums over images stay in single precision.
  const auto kernel_type = p.pass == kToKernel ? memory::data_type::f32 : type;
  const memory::dims shape = {p.o, p.c, p.k, p.k};
  const memory::dims strides = {p.stride, p.stride}, pads = {p.padding, p.padding};
  const auto direct = dnnl::algorithm::convolution_direct;
  const memory::desc any(shape, type, tag::any), any_kernel(shape, kernel_type, tag::any);
  dnnl::primitive_attr attributes;
  attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);

  Primitive made;
  made.images = memory::desc({p.n, p.c, p.h, p.w}, type, tag::nhwc);
  made.results = memory::desc({p.n, p.o, p.rows, p.columns}, type, tag::nhwc);
  made.plain_kernel = memory::desc(shape, kernel_type, tag::hwio);
  const dnnl::convolution_forward::primitive_desc forward(
      Engine(), dnnl::prop_kind::forward_training, direct, made.images, any, made.results, strides,
      pads, pads, attributes);
  if (p.pass == kForward) {
    made.run = dnnl::convolution_forward(forward);
    made.kernel = forward.weights_desc();
    made.scratchpad = forward.scratchpad_desc();
  } else if (p.pass == kToImages) {
    const dnnl::convolution_backward_data::primitive_desc backward(
        Engine(), direct, made.images, any, made.results, strides, pads, pads, forward, attributes);
    made.run = dnnl::convolution_backward_data(backward);
    made.kernel = backward.weights_desc();
    made.scratchpad = backward.scratchpad_desc();
  } else {
    const dnnl::convolution_backward_weights::primitive_desc backward(
        Engine(), direct, made.images, any_kernel, made.results, strides, pads, pads, forward,
        attributes);
    made.run = dnnl::convolution_backward_weights(backward);
    made.kernel = backward.diff_weights_desc();
    made.scratchpad = backward.scratchpad_desc();
  }
  return made;
}

// Returns the primitive of a problem: made once, as that takes milliseconds, and kept.
const Primitive& Prepared(const Problem& problem) {
  static auto* mutex = new std::mutex;
  static auto* kept = new std::map<Problem, std::unique_ptr<Primitive>>;
  std::lock_guard<std::mutex> lock(*mutex);
  auto& primitive = (*kept)[problem];
  if (primitive == nullptr) primitive = std::make_unique<Primitive>(Make(problem));
  return *primitive;
}

// Memory of one thread that is used again by its next call; fresh pages would cost more.
class Workspace {
 public:
  char* Get(size_t bytes) {
    if (bytes > size_) {
      const memory::desc desc({static_cast<int64_t>(bytes)}, memory::data_type::u8,
                              memory::format_tag::a);
      memory_ = memory(desc, Engine());
      size_ = bytes;
    }
    return static_cast<char*>(size_ == 0 ? nullptr : memory_.get_data_handle());
  }

 private:
  memory memory_;
  size_t size_ = 0;
};

// Runs parts on this thread and on those of the pool that are free.
void ForEach(ffi::ThreadPool& pool, int64_t parts, const std::function<void(int64_t)>& run) {
  struct State {
    std::function<void(int64_t)> run;
    int64_t parts, done = 0;
    std::atomic<int64_t> next{0};
    std::mutex mutex;
    std::condition_variable all_done;
    std::exception_ptr error;
  };
  // Shared, as the pool may come to a task when all parts are done and this call has returned.
  auto state = std::make_shared<State>();
  state->run = run;
  state->parts = parts;
  auto work = [state] {
    const Alone alone;
    for (int64_t part; (part = state->next++) < state->parts;) {
      std::exception_ptr error;
      try {
        state->run(part);
      } catch (...) {
        error = std::current_exception();
      }
      std::lock_guard<std::mutex> lock(state->mutex);
      if (error) state->error = error;
      if (++state->done == state->parts) state->all_done.notify_all();
    }
  };
  for (int64_t part = 1; part < parts; ++part) pool.Schedule(std::function<void()>(work));
  work();
  // Parts that are not done yet have been begun, so that waiting for them ends.
  std::unique_lock<std::mutex> lock(state->mutex);
  state->all_done.wait(lock, [&] { return state->done == state->parts; });
  if (state->error) std::rethrow_exception(state->error);
}

void Reorder(const memory::desc& from, void* source, const memory::desc& to, void* target) {
  dnnl::stream stream(Engine());
  memory a(from, Engine(), source), b(to, Engine(), target);
  dnnl::reorder(a, b).execute(stream, a, b);
  stream.wait();
}

void Run(const Primitive& primitive, int64_t pass, void* images, void* kernel, void* results) {
  thread_local Workspace scratch;
  dnnl::stream stream(Engine());
  const memory x(primitive.images, Engine(), images), k(primitive.kernel, Engine(), kernel),
      y(primitive.results, Engine(), results),
      s(primitive.scratchpad, Engine(), scratch.Get(primitive.scratchpad.get_size()));
  const int x_name = pass == kToImages ? DNNL_ARG_DIFF_SRC : DNNL_ARG_SRC;
  const int k_name = pass == kToKernel ? DNNL_ARG_DIFF_WEIGHTS : DNNL_ARG_WEIGHTS;
  const int y_name = pass == kForward ? DNNL_ARG_DST : DNNL_ARG_DIFF_DST;
  primitive.run.execute(stream,
                        {{x_name, x}, {k_name, k}, {y_name, y}, {DNNL_ARG_SCRATCHPAD, s}});
  stream.wait();
}

// How many parts, each of as many images, are the most that threads can take.
int64_t Parts(int64_t images, int64_t threads) {
  int64_t parts = std::max<int64_t>(1, std::min(images, threads));
  while (images % parts != 0) --parts;
  return parts;
}

void Convolve(ffi::ThreadPool& pool, Problem problem, char* images, char* kernel, char* results) {
  thread_local Workspace workspace;
  const Alone alone;
  const int64_t parts = Parts(problem.n, pool.num_threads());
  problem.n /= parts;
  const Primitive& primitive = Prepared(problem);
  const size_t image_bytes = primitive.images.get_size(), bytes = primitive.kernel.get_size();
  const size_t result_bytes = primitive.results.get_size();
  const bool to_kernel = problem.pass == kToKernel;
  const bool plain = primitive.kernel == primitive.plain_kernel;
  char* own = kernel;
  if (to_kernel) {
    own = workspace.Get(parts * bytes);
  } else if (!plain) {
    own = workspace.Get(bytes);
    Reorder(primitive.plain_kernel, kernel, primitive.kernel, own);
  }
  ForEach(pool, parts, [&](int64_t part) {
    Run(primitive, problem.pass, images + part * image_bytes, own + (to_kernel ? part * bytes : 0),
        results + part * result_bytes);
  });
  if (!to_kernel) return;
  const int64_t weights = bytes / sizeof(float), threads = Parts(weights, parts);
  auto* total = reinterpret_cast<float*>(own);
  ForEach(pool, threads, [&](int64_t thread) {
    const int64_t first = thread * (weights / threads), last = first + weights / threads;
    for (int64_t part = 1; part < parts; ++part) {
      for (int64_t i = first; i < last; ++i) total[i] += total[part * weights + i];
    }
  });
  Reorder(primitive.kernel, own, primitive.plain_kernel, kernel);
}

ffi::Error Call(ffi::ThreadPool pool, ffi::AnyBuffer a, ffi::AnyBuffer b,
                ffi::Result<ffi::AnyBuffer> result, int64_t pass, int64_t stride, int64_t padding) {
  // Of images, kernel and results one is computed from the other two, which are given in this order.
  const ffi::AnyBuffer& images = pass == kToImages ? *result : a;
  const ffi::AnyBuffer& kernel = pass == kToKernel ? *result : b;
  const ffi::AnyBuffer& results = pass == kForward ? *result : pass == kToImages ? a : b;
  const bool narrow = images.element_type() == ffi::BF16;
  if (!narrow && images.element_type() != ffi::F32) {
    return ffi::Error::InvalidArgument("oneDNN convolves float32 and bfloat16 here");
  }
  const auto x = images.dimensions(), k = kernel.dimensions(), y = results.dimensions();
  const auto type = narrow ? memory::data_type::bf16 : memory::data_type::f32;
  const Problem problem = {pass, static_cast<int64_t>(type), x[0], x[1], x[2], x[3], k[0], k[3],
                           y[1], y[2], stride, padding};
  try {
    Convolve(pool, problem, static_cast<char*>(images.untyped_data()),
             static_cast<char*>(kernel.untyped_data()), static_cast<char*>(results.untyped_data()));
  } catch (const std::exception& error) {
    return ffi::Error::Internal(std::string("oneDNN: ") + error.what());
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(SireJaxConvolution, Call,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("pass")
                                  .Attr<int64_t>("stride")
                                  .Attr<int64_t>("padding"));
