// Operators of the simulated device: the kernels of the CPU, put into the current stream.
//
// One boxed fallback serves nearly all of them. Shapes of results come from torch's meta kernels, so that results can
// be allocated and handed out before anything has been computed. Where nobody knows them before (`nonzero`), and where
// random numbers are drawn (their order is that of the program), the host waits for the stream and the kernel runs at
// once.
#pragma once
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/stack.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/is_set_to_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <torch/library.h>
#include "interface.h"

namespace sim {

using at::Tensor;
using c10::IValue;
using torch::jit::Stack;

inline bool is_ours(const Tensor& tensor) { return tensor.defined() && tensor.device().type() == DEVICE_TYPE; }

// The same memory as a tensor of the CPU. It owns nothing: as on a real device, to free memory that a kernel still needs
// is a mistake.
inline Tensor as_kernels_see(const Tensor& tensor) {
  auto options = at::TensorOptions(tensor.scalar_type()).device(c10::kCPU);
  bool is_empty = tensor.numel() == 0 || !tensor.storage().data();
  if (is_empty) return at::empty_strided(tensor.sizes(), tensor.strides(), options);
  void* address = tensor.data_ptr();
  if (is_ours(tensor)) {
    size_t start = address_space.offset_of(tensor.storage().data());
    address = address_space.hidden(start + tensor.storage_offset() * tensor.itemsize());
  }
  return at::from_blob(address, tensor.sizes(), tensor.strides(), options);
}

inline Tensor empty_like_on_device(const Tensor& tensor) {
  return at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(the_device()));
}

// Replace every tensor in an argument or a result.
template <typename Function>
void replace_tensors(IValue& value, const Function& by) {
  if (value.isTensor()) {
    if (value.toTensor().defined()) value = by(value.toTensor());
  } else if (value.isTensorList()) {
    auto tensors = value.toTensorVector();
    for (auto& tensor : tensors)
      if (tensor.defined()) tensor = by(tensor);
    value = c10::List<Tensor>(tensors);
  } else if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> tensors;
    for (std::optional<Tensor> tensor : value.toOptionalTensorList()) {
      bool is_there = tensor && tensor->defined();
      tensors.push_back(is_there ? std::optional<Tensor>(by(*tensor)) : tensor);
    }
    value = std::move(tensors);
  }
}

// One call of an operator with tensors of the device.
class Call {
 public:
  Call(const c10::OperatorHandle& op, Stack* stack) : op_(op), schema_(op.schema()), stack_(stack) {
    arguments_.assign(stack->end() - schema_.arguments().size(), stack->end());
    check_results();
    for (auto& argument : arguments_) seen_.push_back(as_seen(argument));
  }

  void run() {
    if (!op_.hasTag(at::Tag::nondeterministic_seeded) && predict())
      put_in();
    else
      run_now();
  }

 private:
  struct Made {
    size_t result;
    std::vector<Tensor> memory;  // of the device, as kernels see it
  };

  void check_results() const {
    for (auto& result : schema_.returns()) {
      auto* alias = result.alias_info();
      TORCH_CHECK(!alias || alias->isWrite(), "simulated device: no such view: ", schema_.operator_name());
    }
  }

  // What the kernel gets for an argument.
  IValue as_seen(IValue argument) const {
    replace_tensors(argument, [&](const Tensor& tensor) {
      if (is_ours(tensor)) return as_kernels_see(tensor);
      TORCH_CHECK(
          tensor.dim() == 0 || takes_indices_of_cpu(), "Expected all tensors to be on the same device, but found at ",
          "least two devices, the simulated one and ", tensor.device(), " (in ", schema_.operator_name(), ")");
      Tensor copy = tensor.clone();  // the host may change it at once
      copy.unsafeGetTensorImpl()->set_wrapped_number(tensor.unsafeGetTensorImpl()->is_wrapped_number());
      return copy;
    });
    if (argument.isDevice() && argument.toDevice().type() == DEVICE_TYPE) return c10::Device(c10::kCPU);
    return argument.isGenerator() ? IValue() : argument;
  }

  bool takes_indices_of_cpu() const {
    static const std::set<std::string> names{
        "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"};
    return names.count(schema_.name()) > 0;
  }

  static IValue as_meta(IValue argument) {
    replace_tensors(argument, [](const Tensor& tensor) {
      auto options = tensor.options().device(c10::kMeta);
      return is_ours(tensor) ? at::empty_strided(tensor.sizes(), tensor.strides(), options) : tensor;
    });
    bool is_ours = argument.isDevice() && argument.toDevice().type() == DEVICE_TYPE;
    return is_ours ? IValue(c10::Device(c10::kMeta)) : argument;
  }

  bool is_out(size_t argument) const { return schema_.arguments()[argument].is_out(); }

  // Find the shapes of results, without computing them; false if nobody knows.
  bool predict() {
    bool makes_results = false, has_out = false;
    for (auto& result : schema_.returns()) makes_results |= result.alias_info() == nullptr;
    for (size_t i = 0; i < arguments_.size(); ++i) has_out |= is_out(i);
    if (!makes_results && !has_out) return true;
    Stack meta;
    for (auto& argument : arguments_) meta.push_back(as_meta(argument));
    try {
      at::AutoDispatchBelowADInplaceOrView below;
      op_.callBoxed(&meta);
    } catch (const std::exception&) {
      return false;
    }
    predicted_.assign(meta.end() - schema_.returns().size(), meta.end());
    for (size_t r = 0; r < predicted_.size(); ++r) {
      bool is_made = !schema_.returns()[r].alias_info();
      if (is_made && !predicted_[r].isTensor() && !predicted_[r].isTensorList()) return false;
    }
    use_statistics_of_cpu();
    return true;
  }

  // Meta kernels tell what CUDA makes. On the CPU the statistics of a layer norm have the dtype of its input, and a batch
  // norm has none in evaluation.
  void use_statistics_of_cpu() {
    if (schema_.name() == "aten::native_batch_norm" && !arguments_[5].toBool())
      for (int r : {1, 2}) predicted_[r] = predicted_[r].toTensor().new_empty({0});
    if (schema_.name() != "aten::native_layer_norm") return;
    auto dtype = arguments_[0].toTensor().scalar_type();
    bool has_weight = arguments_[2].isTensor() && arguments_[2].toTensor().defined();
    if (has_weight && arguments_[2].toTensor().scalar_type() != dtype) return;
    for (int r : {1, 2}) predicted_[r] = predicted_[r].toTensor().to(dtype);
  }

  // Which argument a result is.
  size_t argument_of(const c10::AliasInfo& result) const {
    for (size_t i = 0; i < arguments_.size(); ++i) {
      auto* argument = schema_.arguments()[i].alias_info();
      if (argument && argument->beforeSets() == result.beforeSets()) return i;
    }
    TORCH_CHECK(false, "simulated device: which argument does it return? ", schema_);
  }

  void put_in() {
    std::vector<IValue> results;
    std::vector<Made> made;
    for (size_t r = 0; r < schema_.returns().size(); ++r) {
      if (auto* alias = schema_.returns()[r].alias_info()) {
        size_t i = argument_of(*alias);
        if (is_out(i)) fit(i, predicted_[r].toTensor());
        results.push_back(arguments_[i]);
        continue;
      }
      Made one{r, {}};
      IValue result = predicted_[r];
      replace_tensors(result, [&](const Tensor& predicted) {
        Tensor memory = empty_like_on_device(predicted);
        one.memory.push_back(as_kernels_see(memory));
        return memory;
      });
      results.push_back(std::move(result));
      made.push_back(std::move(one));
    }
    put([op = op_, seen = seen_, made = std::move(made), count = schema_.returns().size()] {
      Stack stack = seen;
      op.callBoxed(&stack);
      for (auto& one : made) {
        size_t next = 0;
        replace_tensors(stack[stack.size() - count + one.result], [&](const Tensor& computed) {
          if (next < one.memory.size()) one.memory[next].copy_(computed);
          ++next;
          return computed;
        });
      }
    });
    return_(std::move(results));
  }

  // An ``out`` gets the shape of what will be written into it.
  void fit(size_t argument, const Tensor& predicted) {
    Tensor out = arguments_[argument].toTensor();
    if (out.sizes() == predicted.sizes()) return;
    out.resize_(predicted.sizes());
    seen_[argument] = as_kernels_see(out);
  }

  void run_now() {
    wait_for_stream(current_stream);
    std::vector<std::pair<Tensor, Tensor>> outs;
    for (size_t i = 0; i < arguments_.size(); ++i) {
      if (!is_out(i) || !arguments_[i].isTensor()) continue;
      Tensor out = arguments_[i].toTensor();
      outs.emplace_back(out, at::empty({0}, out.options().device(c10::kCPU)));
      seen_[i] = outs.back().second;
    }
    Stack stack = seen_;
    {
      at::AutoDispatchBelowADInplaceOrView below;
      op_.callBoxed(&stack);
    }
    for (auto& [out, computed] : outs) {
      if (out.sizes() != computed.sizes()) out.resize_(computed.sizes());
      out.copy_(computed);
    }
    std::vector<IValue> results;
    for (size_t r = 0; r < schema_.returns().size(); ++r) {
      if (auto* alias = schema_.returns()[r].alias_info()) {
        results.push_back(arguments_[argument_of(*alias)]);
        continue;
      }
      IValue result = stack[stack.size() - schema_.returns().size() + r];
      replace_tensors(result, [](const Tensor& computed) { return empty_like_on_device(computed).copy_(computed); });
      results.push_back(std::move(result));
    }
    return_(std::move(results));
  }

  void return_(std::vector<IValue> results) {
    torch::jit::drop(*stack_, arguments_.size());
    for (auto& result : results) stack_->push_back(std::move(result));
  }

  const c10::OperatorHandle& op_;
  const c10::FunctionSchema& schema_;
  Stack* stack_;
  std::vector<IValue> arguments_, seen_, predicted_;
};

inline void kernel_of_cpu(const c10::OperatorHandle& op, Stack* stack) { Call(op, stack).run(); }

// -- what has no kernel of the CPU to be borrowed: memory, views, and copies between host and device

using Sizes = c10::IntArrayRef;
template <typename T>
using Maybe = std::optional<T>;

inline Tensor empty(
    Sizes size, Maybe<at::ScalarType> dtype, Maybe<at::Layout>, Maybe<c10::Device>, Maybe<bool>,
    Maybe<at::MemoryFormat> format) {
  auto keys = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_generic(size, &device_memory, keys, c10::dtype_or_default(dtype), format);
}

inline Tensor empty_strided(
    Sizes size, Sizes stride, Maybe<at::ScalarType> dtype, Maybe<at::Layout>, Maybe<c10::Device>, Maybe<bool>) {
  auto keys = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(size, stride, &device_memory, keys, c10::dtype_or_default(dtype));
}

inline Tensor as_strided(const Tensor& self, Sizes size, Sizes stride, Maybe<int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, size, stride, offset);
}

inline const Tensor& resize(const Tensor& self, Sizes size, Maybe<at::MemoryFormat>) {
  auto* tensor = self.unsafeGetTensorImpl();
  size_t needed = (c10::multiply_integers(size) + tensor->storage_offset()) * tensor->itemsize();
  if (needed > tensor->storage().nbytes()) hooks.resizePrivateUse1Bytes(tensor->storage(), needed);
  tensor->set_sizes_contiguous(size);
  return self;
}

inline Tensor& set_storage_offset(Tensor& self, at::Storage source, int64_t offset, Sizes size, Sizes stride) {
  auto* tensor = self.unsafeGetTensorImpl();
  tensor->set_storage_keep_dtype(std::move(source));
  tensor->set_storage_offset(offset);
  stride.data() ? tensor->set_sizes_and_strides(size, stride) : tensor->set_sizes_contiguous(size);
  return self;
}

inline Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_storage_offset(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

inline Tensor& set_storage(Tensor& self, at::Storage source) {
  int64_t numel = source.nbytes() / self.itemsize();
  return set_storage_offset(self, std::move(source), 0, {numel}, {});
}

inline void record_stream(Tensor& self, c10::Stream stream) {
  device_memory.recordStream(self.storage().data_ptr(), stream);
}

// Page-locked memory is read and written when the stream gets there. Other memory is read at once, and the host waits
// for what is written to it, as CUDA does it.
inline Tensor copy_from(const Tensor& self, const Tensor& into, bool non_blocking) {
  if (self.numel() == 0) return into;
  Tensor source = self.expand_as(into);
  bool is_upload = !is_ours(source), is_download = !is_ours(into);
  bool waits = (is_upload || is_download) && !non_blocking;
  waits |= is_download && !pinned_memory.has(into.data_ptr());
  bool is_staged = is_upload && !pinned_memory.has(source.data_ptr());
  Tensor from = is_staged ? source.clone() : as_kernels_see(source);
  put([from, to = as_kernels_see(into)]() mutable { to.copy_(from); });
  if (waits) wait_for_stream(current_stream);
  return into;
}

inline Tensor copy_from_and_resize(const Tensor& self, const Tensor& into) {
  into.resize_(self.sizes());
  return copy_from(self, into, false);
}

// As the CPU has it. torch takes other devices for ones with a fused kernel, whose bits are others in low precision.
inline Tensor dropout(const Tensor& input, double p, bool train) {
  if (p == 0 || !train || input.numel() == 0) return input;
  if (p == 1) return input.mul(at::zeros({}, input.options()));
  return input * at::empty_like(input).bernoulli_(1 - p).div_(1 - p);
}

inline at::Scalar item(const Tensor& self) {
  wait_for_stream(current_stream);
  return at::_local_scalar_dense(as_kernels_see(self));
}

}  // namespace sim
