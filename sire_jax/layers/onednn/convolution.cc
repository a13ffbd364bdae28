// oneDNN's convolutions, called by XLA (jax.ffi): images [n, h, w, c], kernels [k, k, c, o].
//
// A call is split over its images, and XLA's own threads take the parts. On each of them oneDNN uses
// that thread alone, so that no other threads stand beside XLA's.

#include <algorithm>
#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "dnnl.hpp"
#include "xla/ffi/api/ffi.h"

extern "C" {
int omp_get_max_threads();
void omp_set_num_threads(int threads);
}

namespace {

namespace ffi = xla::ffi;
using dnnl::memory;

// Weights that one thread sums sooner than another would wake.
constexpr int64_t kFew = 1 << 17;
// Some tens of microseconds.
constexpr int kPatience = 100;

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
  // The kernel as it is given or returned, and as oneDNN wants it; from the one to the other.
  memory::desc plain_kernel, kernel;
  dnnl::primitive reorder;
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
  const bool back = p.pass == kToKernel;
  made.reorder = dnnl::reorder(dnnl::reorder::primitive_desc(
      Engine(), back ? made.kernel : made.plain_kernel, Engine(),
      back ? made.plain_kernel : made.kernel));
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

// Memory that a call has for itself. It is kept for the next calls, as fresh pages would cost more:
// as many pieces as there have been calls at once.
class Workspace {
 public:
  explicit Workspace(size_t bytes) {
    {
      std::lock_guard<std::mutex> lock(Mutex());
      if (!Free().empty()) {
        std::swap(piece_, Free().back());
        Free().pop_back();
      }
    }
    if (piece_.bytes >= bytes) return;
    std::free(piece_.data);
    // Whole cache lines, as vector instructions want them.
    piece_.bytes = (bytes + 63) / 64 * 64;
    piece_.data = static_cast<char*>(std::aligned_alloc(64, piece_.bytes));
    if (piece_.data == nullptr) throw std::bad_alloc();
  }
  ~Workspace() {
    std::lock_guard<std::mutex> lock(Mutex());
    Free().push_back(piece_);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  char* data() const { return piece_.data; }

 private:
  struct Piece {
    char* data = nullptr;
    size_t bytes = 0;
  };
  static std::mutex& Mutex() {
    static auto* mutex = new std::mutex;
    return *mutex;
  }
  static std::vector<Piece>& Free() {
    static auto* free = new std::vector<Piece>;
    return *free;
  }
  Piece piece_;
};

// Runs parts on this thread and on those of the pool that are free.
void ForEach(ffi::ThreadPool& pool, int64_t parts, const std::function<void(int64_t)>& run) {
  struct State {
    std::function<void(int64_t)> run;
    int64_t parts;
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable all_done;
    std::exception_ptr error;
  };
  if (parts == 1) return run(0);
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
  try {
    for (int64_t part = 1; part < parts; ++part) pool.Schedule(std::function<void()>(work));
  } catch (...) {
    // This thread takes what no other one was told of.
  }
  work();
  // Parts that are not done yet have been begun, so that waiting for them ends; mostly they are done
  // sooner than a sleeping thread would wake.
  for (int turn = 0; turn < kPatience && state->done != parts; ++turn) std::this_thread::yield();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->all_done.wait(lock, [&] { return state->done == state->parts; });
  if (state->error) std::rethrow_exception(state->error);
}

dnnl::stream& Stream() {
  thread_local dnnl::stream stream(Engine());
  return stream;
}

// Puts a kernel into oneDNN's arrangement, or, a gradient, out of it.
void Reorder(const Primitive& primitive, bool back, void* source, void* target) {
  const memory a(back ? primitive.kernel : primitive.plain_kernel, Engine(), source);
  const memory b(back ? primitive.plain_kernel : primitive.kernel, Engine(), target);
  primitive.reorder.execute(Stream(), {{DNNL_ARG_FROM, a}, {DNNL_ARG_TO, b}});
  Stream().wait();
}

void Run(const Primitive& primitive, int64_t pass, void* images, void* kernel, void* results) {
  const Workspace scratch(primitive.scratchpad.get_size());
  const memory x(primitive.images, Engine(), images), k(primitive.kernel, Engine(), kernel),
      y(primitive.results, Engine(), results),
      s(primitive.scratchpad, Engine(), scratch.data());
  const int x_name = pass == kToImages ? DNNL_ARG_DIFF_SRC : DNNL_ARG_SRC;
  const int k_name = pass == kToKernel ? DNNL_ARG_DIFF_WEIGHTS : DNNL_ARG_WEIGHTS;
  const int y_name = pass == kForward ? DNNL_ARG_DST : DNNL_ARG_DIFF_DST;
  primitive.run.execute(Stream(),
                        {{x_name, x}, {k_name, k}, {y_name, y}, {DNNL_ARG_SCRATCHPAD, s}});
  Stream().wait();
}

// How many parts, each of as many images, are the most that threads can take.
int64_t Parts(int64_t images, int64_t threads) {
  int64_t parts = std::max<int64_t>(1, std::min(images, threads));
  while (images % parts != 0) --parts;
  return parts;
}

// Returns into how many parts to split a problem: for each thread one, but no more than that the
// kernels of all parts, where they are summed, take as much memory as images and results.
int64_t MostParts(const Problem& p, int64_t threads) {
  if (p.pass != kToKernel) return threads;
  const int64_t arrays = p.n * (p.h * p.w * p.c + p.rows * p.columns * p.o);
  return std::min(threads, std::max<int64_t>(2, arrays / (p.k * p.k * p.c * p.o)));
}

void Convolve(ffi::ThreadPool& pool, Problem problem, char* images, char* kernel, char* results) {
  const Alone alone;
  const int64_t parts = Parts(problem.n, MostParts(problem, pool.num_threads()));
  problem.n /= parts;
  const Primitive& primitive = Prepared(problem);
  const size_t image_bytes = primitive.images.get_size(), bytes = primitive.kernel.get_size();
  const size_t result_bytes = primitive.results.get_size();
  const bool to_kernel = problem.pass == kToKernel;
  const bool plain = primitive.kernel == primitive.plain_kernel;
  // A kernel in oneDNN's arrangement: the one that is given, or one for each part to be summed.
  const Workspace workspace(to_kernel ? parts * bytes : plain ? 0 : bytes);
  char* own = to_kernel || !plain ? workspace.data() : kernel;
  if (!to_kernel && !plain) Reorder(primitive, false, kernel, own);
  ForEach(pool, parts, [&](int64_t part) {
    Run(primitive, problem.pass, images + part * image_bytes, own + (to_kernel ? part * bytes : 0),
        results + part * result_bytes);
  });
  if (!to_kernel) return;
  const int64_t weights = bytes / sizeof(float);
  const int64_t threads = weights < kFew ? 1 : Parts(weights, parts);
  auto* total = reinterpret_cast<float*>(own);
  ForEach(pool, threads, [&](int64_t thread) {
    const int64_t first = thread * (weights / threads), last = first + weights / threads;
    for (int64_t part = 1; part < parts; ++part) {
      for (int64_t i = first; i < last; ++i) total[i] += total[part * weights + i];
    }
  });
  Reorder(primitive, true, own, kernel);
}

ffi::Error Call(ffi::ThreadPool pool, ffi::AnyBuffer a, ffi::AnyBuffer b,
                ffi::Result<ffi::AnyBuffer> result, int64_t pass, int64_t stride, int64_t padding) {
  // Of images, kernel and results one is computed from the other two, which are given in this order.
  const ffi::AnyBuffer& images = pass == kToImages ? *result : a;
  const ffi::AnyBuffer& kernel = pass == kToKernel ? *result : b;
  const ffi::AnyBuffer& results = pass == kForward ? *result : pass == kToImages ? a : b;
  const auto x = images.dimensions(), k = kernel.dimensions(), y = results.dimensions();
  const bool narrow = a.element_type() == ffi::BF16;
  if ((!narrow && a.element_type() != ffi::F32) || a.element_type() != b.element_type()) {
    return ffi::Error::InvalidArgument("oneDNN convolves float32 and bfloat16 here");
  }
  if (x.size() != 4 || k.size() != 4 || y.size() != 4 || k[0] != k[1] || x[3] != k[2] ||
      y[3] != k[3] || x[0] != y[0]) {
    return ffi::Error::InvalidArgument("images, kernel and results don't fit together");
  }
  if (a.element_count() == 0 || b.element_count() == 0) {
    std::memset(result->untyped_data(), 0, result->size_bytes());
    return ffi::Error::Success();
  }
  const auto type = narrow ? memory::data_type::bf16 : memory::data_type::f32;
  const Problem problem = {pass, static_cast<int64_t>(type), x[0], x[1], x[2], x[3], k[0], k[3],
                           y[1], y[2], stride, padding};
  try {
    Convolve(pool, problem, static_cast<char*>(images.untyped_data()),
             static_cast<char*>(kernel.untyped_data()), static_cast<char*>(results.untyped_data()));
  } catch (const std::exception& error) {
    return ffi::Error::Internal(std::string("oneDNN: ") + error.what());
  } catch (...) {
    return ffi::Error::Internal("oneDNN: unknown error");
  }
  return ffi::Error::Success();
}

}  // namespace

// Whether this processor has instructions for bfloat16, or some that do as well.
extern "C" bool SireJaxHasBfloat16() {
  try {
    for (int64_t pass : {kForward, kToImages, kToKernel}) {
      Make({pass, static_cast<int64_t>(memory::data_type::bf16), 1, 4, 4, 16, 3, 16, 4, 4, 1, 1});
    }
    return true;
  } catch (const dnnl::error&) {
    return false;
  }
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(SireJaxConvolution, Call,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("pass")
                                  .Attr<int64_t>("stride")
                                  .Attr<int64_t>("padding"));
