// A device of PyTorch whose tensors are in the memory of the host: see tests/pretend.py.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>
#include <torch/library.h>
#include <cstdlib>
#include <set>

constexpr auto PU1 = c10::DeviceType::PrivateUse1;
static bool strict = false;  // whether to raise for what makes Python wait for a GPU

struct Alloc final : c10::Allocator {
  static void del(void* p) { free(p); }
  c10::DataPtr allocate(size_t n) override {
    void* p = n ? aligned_alloc(64, (n + 63) / 64 * 64) : nullptr;
    return {p, p, &del, c10::Device(PU1, 0)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &del; }
  void copy_data(void* d, const void* s, std::size_t n) const override {
    default_copy_data(d, s, n);
  }
};
static Alloc alloc;
REGISTER_ALLOCATOR(PU1, &alloc);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return PU1; }
  c10::Device exchangeDevice(c10::Device) const override { return c10::Device(PU1, 0); }
  c10::Device getDevice() const override { return c10::Device(PU1, 0); }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override {
    return c10::Stream(c10::Stream::DEFAULT, c10::Device(PU1, 0));
  }
  c10::Stream getDefaultStream(c10::Device) const override {
    return c10::Stream(c10::Stream::DEFAULT, c10::Device(PU1, 0));
  }
  c10::Stream getNewStream(c10::Device, int = 0) const override {
    return c10::Stream(c10::Stream::DEFAULT, c10::Device(PU1, 0));
  }
  c10::Stream exchangeStream(c10::Stream) const override {
    return c10::Stream(c10::Stream::DEFAULT, c10::Device(PU1, 0));
  }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void** e, const c10::Stream&, const c10::DeviceIndex,
              const c10::EventFlag) const override {
    *e = (void*)1;
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Gen final : c10::GeneratorImpl {
  at::Generator cpu;
  Gen(at::Generator g)
      : GeneratorImpl(c10::Device(PU1, 0), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)),
        cpu(std::move(g)) {}
  void set_current_seed(uint64_t s) override { cpu.set_current_seed(s); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return cpu.current_seed(); }
  uint64_t seed() override { return cpu.seed(); }
  void set_state(const c10::TensorImpl& t) override { cpu.unsafeGetGeneratorImpl()->set_state(t); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return cpu.unsafeGetGeneratorImpl()->get_state();
  }
  GeneratorImpl* clone_impl() const override { return new Gen(cpu.clone()); }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static at::Generator g = at::make_generator<Gen>(at::detail::getDefaultCPUGenerator());
    return g;
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::make_generator<Gen>(at::detail::createCPUGenerator());
  }
  at::Device getDeviceFromPtr(void*) const override { return at::Device(PU1, 0); }
  void resizePrivateUse1Bytes(const c10::Storage& s, size_t n) const override {
    auto* impl = s.unsafeGetStorageImpl();
    auto data = alloc.allocate(n);
    std::memcpy(data.get(), impl->data(), std::min(n, impl->nbytes()));
    impl->set_data_ptr_noswap(std::move(data));
    impl->set_nbytes(n);
  }
};
static bool hooks = (at::RegisterPrivateUse1HooksInterface(new Hooks()), true);

// An alias of the same memory as a CPU tensor.
static at::Tensor host(const at::Tensor& t) {
  if (!t.defined() || t.device().type() != PU1) return t;
  auto keep = t;
  auto r = at::from_blob(
      t.data_ptr(), t.sizes(), t.strides(), [keep](void*) {},
      t.options().device(at::kCPU).requires_grad(false));
  if (t.is_conj()) r = r.conj();
  return t.is_neg() ? at::_neg_view(r) : r;
}

static at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype,
                        std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>,
                        std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &alloc, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}
static at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride,
                                std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                                std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &alloc,
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}
static at::Tensor copy_from(const at::Tensor& self, const at::Tensor& dst, bool) {
  TORCH_CHECK(!(strict && dst.device() != self.device()), "SYNC: a copy between the devices");
  host(dst).copy_(host(self));
  return dst;
}
static at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& dst) {
  if (dst.sizes() != self.sizes()) dst.resize_(self.sizes());
  host(dst).copy_(host(self));
  return dst;
}
static at::Tensor strided(const at::Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride,
                          std::optional<int64_t> offset) {
  auto r = at::detail::make_tensor<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(self.storage()), self.key_set(), self.dtype());
  r.unsafeGetTensorImpl()->set_storage_offset(offset.value_or(self.storage_offset()));
  r.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride);
  return r;
}
static at::Tensor view(const at::Tensor& self, c10::IntArrayRef size) {
  auto v = host(self).view(size);
  return strided(self, v.sizes(), v.strides(), std::nullopt);
}
static at::Tensor reshape_alias(const at::Tensor& self, c10::IntArrayRef size,
                                c10::IntArrayRef stride) {
  return strided(self, size, stride, std::nullopt);
}
static at::Tensor retyped(const at::Tensor& self, const at::Tensor& v) {
  auto r = at::detail::make_tensor<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(self.storage()), self.key_set(), v.dtype());
  r.unsafeGetTensorImpl()->set_storage_offset(self.storage_offset() * self.itemsize() /
                                              v.itemsize());
  r.unsafeGetTensorImpl()->set_sizes_and_strides(v.sizes(), v.strides());
  return r;
}
static at::Tensor view_as_real(const at::Tensor& self) {
  return retyped(self, at::view_as_real(host(self)));
}
static at::Tensor view_as_complex(const at::Tensor& self) {
  return retyped(self, at::view_as_complex(host(self)));
}
static at::Tensor unfold(const at::Tensor& self, int64_t d, int64_t n, int64_t s) {
  auto v = host(self).unfold(d, n, s);
  return strided(self, v.sizes(), v.strides(), std::nullopt);
}
static const at::Tensor& resize(const at::Tensor& self, c10::IntArrayRef size,
                                std::optional<at::MemoryFormat>) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  size_t n = (self.numel() + self.storage_offset()) * self.dtype().itemsize();
  if (n > impl->unsafe_storage().nbytes())
    at::detail::getPrivateUse1Hooks().resizePrivateUse1Bytes(impl->unsafe_storage(), n);
  return self;
}
static at::Scalar item(const at::Tensor& self) {
  TORCH_CHECK(!strict, "SYNC: a number of a tensor was read");
  return host(self).item();
}
static at::Tensor& set_storage(at::Tensor& self, at::Storage s, int64_t offset,
                               c10::IntArrayRef size, c10::IntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(s);
  self.unsafeGetTensorImpl()->set_storage_offset(offset);
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride);
  return self;
}
static at::Tensor& set_all(at::Tensor& self, at::Storage s) {
  return set_storage(self, s, 0, {int64_t(s.nbytes() / self.dtype().itemsize())}, {1});
}
static at::Tensor dev(const at::Tensor& t) {
  if (!t.defined()) return t;
  const bool before = std::exchange(strict, false);  // the same memory on a real device
  auto r = t.to(at::Device(PU1, 0));
  strict = before;
  return r;
}
static at::Tensor conv(const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& b,
                       c10::IntArrayRef st, c10::IntArrayRef pa, c10::IntArrayRef di, bool tr,
                       c10::IntArrayRef op, int64_t g) {
  TORCH_CHECK(x.device() == w.device() && (!b || !b->defined() || b->device() == x.device()),
              "MIXED devices in convolution");
  return dev(at::convolution(host(x), host(w),
                             b && b->defined() ? std::optional<at::Tensor>(host(*b)) : std::nullopt,
                             st, pa, di, tr, op, g));
}
static std::tuple<at::Tensor, at::Tensor, at::Tensor> conv_back(
    const at::Tensor& go, const at::Tensor& x, const at::Tensor& w, c10::IntArrayRef st,
    c10::IntArrayRef pa, c10::IntArrayRef di, bool tr, c10::IntArrayRef op, int64_t g,
    std::array<bool, 3> mask) {
  int64_t c = tr ? w.size(1) * g : w.size(0);
  auto [a, b, d] = at::convolution_backward(host(go), host(x), host(w), c10::IntArrayRef{c}, st, pa,
                                            di, tr, op, g, mask);
  return {dev(a), dev(b), dev(d)};
}
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("as_strided", strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("unfold", unfold);
  m.impl("view_as_real", view_as_real);
  m.impl("view_as_complex", view_as_complex);
  m.impl("resize_", resize);
  m.impl("_local_scalar_dense", item);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Storage", set_all);
  m.impl("convolution_overrideable", conv);
  m.impl("convolution_backward_overrideable", conv_back);
}

static const std::set<std::string> SYNC = {"aten::nonzero",    "aten::masked_select",
                                           "aten::equal",      "aten::_unique2",
                                           "aten::unique_dim", "aten::repeat_interleave.Tensor"};

// The CPU's kernel, on the same memory. So operations in place need no copies.
static void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  TORCH_CHECK(!(strict && SYNC.count(schema.name())), "SYNC: ", schema.name());
  const size_t n = schema.arguments().size();
  const std::vector<c10::IValue> args(stack->end() - n, stack->end());
  std::vector<std::pair<at::Tensor, at::Tensor>> resized;
  auto into = [&](const at::Tensor& t, bool written) -> at::Tensor {
    if (!t.defined()) return t;
    TORCH_CHECK(t.device().type() == PU1 || t.dim() == 0,
                "Expected all tensors to be on the same device, but found ", t.device(), " in ",
                schema.name());
    if (!written) return host(t);
    resized.emplace_back(t, at::empty({0}, t.options().device(at::kCPU)));
    return resized.back().second;
  };
  for (size_t i = 0; i < n; ++i) {
    const c10::IValue& v = args[i];
    auto* alias = schema.arguments()[i].alias_info();
    // An argument ``out`` is resized by the kernel, which an alias cannot be.
    const bool written = schema.arguments()[i].kwarg_only() && alias != nullptr && alias->isWrite();
    c10::IValue& out = (*stack)[stack->size() - n + i];
    if (v.isTensor()) {
      out = into(v.toTensor(), written);
    } else if (v.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const auto& t : v.toTensorVector()) list.push_back(into(t, written));
      out = list;
    } else if (v.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const auto& t : v.toOptionalTensorList()) {
        std::optional<at::Tensor> u = t;
        list.push_back(u ? std::optional<at::Tensor>(into(*u, written)) : std::nullopt);
      }
      out = list;
    } else if (v.isDevice()) {
      out = at::Device(at::kCPU);
    } else if (v.isGenerator()) {
      auto g = v.toGenerator();
      TORCH_CHECK(g.device().type() == PU1, "Expected a generator on the device, found ",
                  g.device());
      out = static_cast<Gen*>(g.unsafeGetGeneratorImpl())->cpu;
    }
  }
  const bool before = std::exchange(strict, false);
  try {
    op.callBoxed(stack);
  } catch (...) {
    strict = before;
    throw;
  }
  for (auto& [t, r] : resized) copy_from_and_resize(r, t);
  const size_t m = schema.returns().size();
  for (size_t k = 0; k < m; ++k) {
    c10::IValue& out = (*stack)[stack->size() - m + k];
    auto* alias = schema.returns()[k].alias_info();
    bool found = false;
    for (size_t i = 0; i < n && alias != nullptr && alias->isWrite(); ++i) {
      auto* of = schema.arguments()[i].alias_info();
      if (of != nullptr && *of == *alias) {
        out = args[i];
        found = true;
        break;
      }
    }
    if (found) continue;
    if (out.isTensor()) {
      out = dev(out.toTensor());
    } else if (out.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const auto& t : out.toTensorVector()) list.push_back(dev(t));
      out = list;
    }
  }
  strict = before;
}
// `host` keeps these bits. Torch would resolve them by a copy.
TORCH_LIBRARY_IMPL(aten, Conjugate, m) {
  m.impl("_copy_from", torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(aten, Negative, m) {
  m.impl("_copy_from", torch::CppFunction::makeFallthrough());
}

#define LOWER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define WIDER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1,
                   m){AT_FORALL_LOWER_PRECISION_FP(LOWER)
                          AT_FORALL_FP32(WIDER)} TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("strict", [](bool on) { strict = on; });
}
