// Check of host/dispatch.cpp: who plans launches, what it gets, and what callers are told, with made-up entries on a made-up GPU.
// Its arguments are the texts that FLASH_ATTN_ISA and FLASH_ATTN_TEST_SMEM_KB should have when the program starts.
#include <cstring>
#include <initializer_list>
#include <tuple>

#include "check.h"
#include "host/dispatch.cpp"
#include "host/pinned.cpp"
#include "host/smem_limit.cpp"

using namespace flash;
using check::expect;

// --- GPUs ---------------------------------------------------------------------------------------

struct Gpu {
  int major, minor, smem_kb;
};
constexpr Gpu kGpus[] = {{9, 0, 227}, {8, 6, 99}, {12, 0, 99}, {9, 0, 0}};
enum Device { kHopper, kSm86, kSm120, kUnknown };
int current_device = kHopper;

extern "C" {
cudaError_t cudaGetDevice(int* device) { return *device = current_device, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device == kUnknown) { return cudaErrorInvalidValue; }
  Gpu const& gpu = kGpus[device];
  *value         = attribute == cudaDevAttrComputeCapabilityMajor   ? gpu.major
                   : attribute == cudaDevAttrComputeCapabilityMinor ? gpu.minor
                                                                    : gpu.smem_kb * 1024;
  return cudaSuccess;
}
char const* cudaGetErrorString(cudaError_t) { return "what CUDA says"; }
}

// --- Kernels ------------------------------------------------------------------------------------

struct Seen {
  int planned, launched;  // the isa
  int planned_kb, launched_kb, planned_capability;
  int64_t note;
  void* workspace;
  int* counters;
} seen;
cudaError_t result = cudaSuccess, refused = cudaSuccess;
int counters[4];
bool has_counters = true;

namespace flash {
int* zeroed_counters(int64_t count, cudaStream_t) {
  return has_counters && count == 4 ? counters : nullptr;
}
}  // namespace flash

template <class Params, Isa kIsa>
struct Kernels {
  // sm80: one head dimension.  sm90: masks that are causal.
  static bool serves(Params const& params) {
    return kIsa == Isa::kSm80 ? has_one_head_dim(params.problem)
                              : params.problem.mask == MaskKind::kCausal;
  }
  static void plan(Params const& params, Plan& plan) {
    seen.planned = int(kIsa), seen.planned_kb = plan.smem_kb;
    seen.planned_capability = plan.capability;
    plan.refused            = refused;
    plan.workspace_bytes    = 16 * int(kIsa);
    plan.counters           = kIsa == Isa::kSm90 ? 4 : 0;
    put_notes(plan, int64_t(params.problem.batch));
  }
  static cudaError_t launch(Params const&, Plan const& plan, Scratch const& scratch, cudaStream_t) {
    seen.launched = int(kIsa), seen.launched_kb = plan.smem_kb;
    seen.note      = get_notes<int64_t>(plan);
    seen.workspace = scratch.workspace, seen.counters = scratch.counters;
    return result;
  }
};

// sm90: with 32 of v.
template <class Params, Isa kIsa>
Entry<Params> const kEntry{kIsa,
                           64,
                           kIsa == Isa::kSm90 ? 32 : 64,
                           DType::kBf16,
                           &Kernels<Params, kIsa>::serves,
                           &Kernels<Params, kIsa>::plan,
                           &Kernels<Params, kIsa>::launch};

namespace flash {
FwdEntry const* const kFwdEntries[]       = {&kEntry<FwdParams, Isa::kSm90>,
                                             &kEntry<FwdParams, Isa::kSm80>, nullptr};
BwdEntry const* const kBwdEntries[]       = {&kEntry<BwdParams, Isa::kSm90>,
                                             &kEntry<BwdParams, Isa::kSm80>, nullptr};
DecodeEntry const* const kDecodeEntries[] = {&kEntry<DecodeParams, Isa::kSm80>, nullptr};
char const* const kBuiltArchs             = "80,90";
char const* const kBuiltSmemKb            = "227,163";
}  // namespace flash

// --- Checks -------------------------------------------------------------------------------------

template <class Params>
Params call(MaskKind mask, int head_dim = 64, DType dtype = DType::kBf16) {
  Params params{};
  params.problem.head_dim = params.problem.head_dim_v = head_dim;
  params.problem.mask = mask, params.problem.dtype = dtype;
  params.problem.batch = 7;
  return params;
}

void expect_failure(char const* what, Status const& status,
                    std::initializer_list<char const*> words) {
  expect(status.code != cudaSuccess, "%s: no failure", what);
  if (status.code == cudaSuccess) return;
  for (char const* word : words) {
    expect(std::strstr(status.message, word), "%s: no '%s' in: %s", what, word, status.message);
  }
}

void check_who_plans_launches() {
  for (auto [mask, isa] : {std::pair{MaskKind::kCausal, 90}, {MaskKind::kLocal, 80}}) {
    seen                   = {};
    BwdParams const params = call<BwdParams>(mask);
    Plan const plan        = plan_bwd(params);
    expect(seen.planned == isa && seen.launched == 0, "planned by sm%d, not sm%d", seen.planned,
           isa);
    expect(plan.workspace_bytes == 16 * isa, "%lld bytes", (long long)plan.workspace_bytes);
    // The plan stays with its kernel, whatever calls are limited to by now.
    pin_isa(isa == 90 ? "sm80" : "sm90");
    Status const status = launch_bwd(params, plan, &seen, nullptr);
    pin_isa("");
    expect(status.code == cudaSuccess && !status.message, "launch failed: %s", status.message);
    expect(seen.launched == isa && seen.note == 7 && seen.workspace == &seen,
           "launched by sm%d with note %lld", seen.launched, (long long)seen.note);
    expect(seen.counters == (isa == 90 ? counters : nullptr), "counters of sm%d", isa);
  }
  seen = {};
  expect(launch_fwd(call<FwdParams>(MaskKind::kCausal), nullptr).code == cudaSuccess &&
             seen.planned == 90 && seen.launched == 90,
         "forward: planned by sm%d, launched by sm%d", seen.planned, seen.launched);
}

void check_pin() {
  auto const isa_of = [](char const* pin) {
    seen = {};
    expect(pin_isa(pin).code == cudaSuccess, "pin_isa(%s) fails", pin ? pin : "null");
    launch_fwd(call<FwdParams>(MaskKind::kCausal), nullptr);
    return seen.launched;
  };
  expect(isa_of("sm80") == 80 && std::strcmp(pinned_isa(), "sm80") == 0, "not pinned to sm80");
  expect(isa_of("sm90") == 90 && std::strcmp(pinned_isa(), "sm90") == 0, "not pinned to sm90");
  expect_failure("pinned to what does not serve",
                 launch_fwd(call<FwdParams>(MaskKind::kLocal), nullptr),
                 {"head_dim 64", "bf16", "FLASH_ATTN_ISA: sm90", "sm90,sm80"});
  DecodeParams const decode = call<DecodeParams>(MaskKind::kCausal);
  Plan const plan           = plan_decode(decode);
  expect_failure("plan without a kernel", check_plan(decode, plan), {"built for: sm80"});
  expect(plan.workspace_bytes == 0, "a plan without a kernel needs %lld bytes",
         (long long)plan.workspace_bytes);
  expect_failure("pinned to an isa without the pass", launch_decode(decode, plan, nullptr, nullptr),
                 {"built for: sm80", "FLASH_ATTN_ISA: sm90"});
  expect(isa_of("") == 90 && isa_of(nullptr) == 90 && !*pinned_isa(), "still pinned");
  expect_failure("pin_isa of no isa", pin_isa("sm75"), {"isa must be", "sm90", "sm80", "sm75"});
  expect(isa_of(nullptr) == 90, "pinned to no isa");
}

void check_messages() {
  expect_failure("dtype that is not built",
                 launch_fwd(call<FwdParams>(MaskKind::kNone, 64, DType::kFp16), nullptr),
                 {"head_dim 64 with fp16", "not in this build", "built: head_dim 64; dtype bf16",
                  "FLASH_ATTN_DTYPES"});
  expect_failure("head dimension that is not built",
                 launch_fwd(call<FwdParams>(MaskKind::kNone, 72), nullptr),
                 {"head_dim 72", "the kernel for head_dim 96", "FLASH_ATTN_HEAD_DIMS"});
  FwdParams narrow          = call<FwdParams>(MaskKind::kNone);
  narrow.problem.head_dim_v = 32;
  seen                      = {};
  expect_failure("head dimension of v that no kernel serves", launch_fwd(narrow, nullptr),
                 {"head_dim 64 of q and k with head_dim 32 of v, bf16", "forward pass",
                  "compute capability 9.0", "from 129 to 192 with v's up to 128",
                  "built: sm90,sm80; head_dim 64/32,64; dtype bf16", "FLASH_ATTN_ISA: all)"});
  expect(seen.launched == 0, "launched without a kernel for v's head dimension");
  narrow.problem.mask = MaskKind::kCausal;
  expect(launch_fwd(narrow, nullptr).code == cudaSuccess && seen.launched == 90,
         "v of its own head dimension: launched by sm%d", seen.launched);
  result = cudaErrorNoKernelImageForDevice;
  expect_failure("failed launch", launch_fwd(call<FwdParams>(MaskKind::kNone), nullptr),
                 {"sm80", "head_dim 64, bf16", "what CUDA says", "80,90", "tiles for 227,163 KB",
                  "this GPU allows 227 KB: rebuild with a FLASH_ATTN_CUDA_ARCHS that has 90)"});
  result = cudaErrorInvalidValue;
  expect_failure("launch that no rebuild would help",
                 launch_fwd(call<FwdParams>(MaskKind::kNone), nullptr),
                 {"sm80", "what CUDA says", "this GPU allows 227 KB)"});
  result       = cudaSuccess;
  has_counters = false;
  seen         = {};
  expect_failure("no memory for counters", launch_fwd(call<FwdParams>(MaskKind::kCausal), nullptr),
                 {"out of CUDA memory"});
  expect(seen.launched == 0, "launched without counters");
  has_counters = true;
}

// A lowered limit is an argument of the plan and its launch, and keeps calls to sm80.
void check_smem_limit() {
  for (auto [kb, want, isa] :
       {std::tuple{0, 227, 90}, {227, 227, 90}, {163, 163, 80}, {99, 99, 80}}) {
    expect(limit_smem_kb(kb).code == cudaSuccess, "a limit of %d KB fails", kb);
    seen                   = {};
    BwdParams const params = call<BwdParams>(MaskKind::kCausal);
    Plan const plan        = plan_bwd(params);
    limit_smem_kb(0);  // the plan keeps what it was made for
    expect(launch_bwd(params, plan, nullptr, nullptr).code == cudaSuccess, "%d KB: no launch", kb);
    expect(seen.planned_kb == want && seen.launched_kb == want,
           "limit %d: planned for %d KB, launched for %d", kb, seen.planned_kb, seen.launched_kb);
    expect(seen.planned == isa && seen.launched == isa, "limit %d: sm%d", kb, seen.launched);
    expect(seen.planned_capability == isa, "limit %d: planned for a GPU of capability %d", kb,
           seen.planned_capability);
  }
  // Not only plans: what has none asks for itself.
  for (auto [kb, want] : {std::pair{99, 80}, {227, 90}, {0, 90}}) {
    limit_smem_kb(kb);
    expect(planned_capability() == want, "limit %d: capability %d", kb, planned_capability());
  }
  for (int kb : {-1, 1, 98, 100, 228}) {
    expect_failure("no size", limit_smem_kb(kb), {"kb must be 99, 163, 227 or 0", "got"});
    expect(smem_limit_kb() == 227, "limited by no size");
  }
}

// What does not fit says what is built, what is allowed and which variable helps, and nothing is launched.
void check_refusals() {
  FwdParams const forward   = call<FwdParams>(MaskKind::kNone);
  DecodeParams const decode = call<DecodeParams>(MaskKind::kNone);
  expect(check_plan(forward, plan_fwd(forward)).code == cudaSuccess &&
             check_plan(decode, plan_decode(decode)).code == cudaSuccess,
         "plans that nothing refuses");
  seen    = {};
  refused = cudaErrorInvalidConfiguration;
  for (auto [device, limit, tiles, help] :
       {std::tuple{kHopper, 99, "FLASH_ATTN_TEST_SMEM_KB allows 99 KB",
                   "rebuild with a FLASH_ATTN_SMEM_KB that has 99)"},
        {kHopper, 163, "FLASH_ATTN_TEST_SMEM_KB allows 163 KB)", ""},
        {kSm86, 0, "this GPU allows 99 KB", "rebuild with a FLASH_ATTN_SMEM_KB that has 99)"},
        {kSm120, 0, "this GPU allows 99 KB", "rebuild with a FLASH_ATTN_CUDA_ARCHS that has 120)"},
        {kUnknown, 0, "this GPU allows 0 KB)", ""}}) {
    current_device = device;
    limit_smem_kb(limit);
    for (Status const& status :
         {check_plan(forward, plan_fwd(forward)), check_plan(decode, plan_decode(decode)),
          launch_fwd(forward, nullptr),
          launch_decode(decode, plan_decode(decode), nullptr, nullptr)}) {
      expect_failure("tiles that are not built", status, {"tiles for 227,163 KB", tiles, help});
    }
  }
  expect(seen.launched == 0, "what was refused is launched by sm%d", seen.launched);
  refused = cudaSuccess;
  // A build for other GPUs fails at the launch, where its tiles fit.
  current_device = kSm120, result = cudaErrorInvalidValue;
  expect_failure("code that is not built", launch_fwd(forward, nullptr),
                 {"FLASH_ATTN_CUDA_ARCHS that has 120"});
  current_device = kHopper, result = cudaSuccess;
  limit_smem_kb(0);
}

// What the environment's FLASH_ATTN_TEST_SMEM_KB does; the other checks begin after that.
void check_smem_environment(char const* text) {
  seen                      = {};
  DecodeParams const params = call<DecodeParams>(MaskKind::kCausal);
  Plan const plan           = plan_decode(params);
  // What the message says is what was read, not what is there by now.
  setenv("FLASH_ATTN_TEST_SMEM_KB", "changed", 1);
  Status const status = launch_decode(params, plan, nullptr, nullptr);
  int const kb        = std::atoi(text);
  if (*text && (!is_smem_size(kb) || std::to_string(kb) != text)) {
    expect_failure("a variable that is no size", status,
                   {"FLASH_ATTN_TEST_SMEM_KB=", text, "99, 163 or 227"});
    expect(seen.launched == 0, "launched with FLASH_ATTN_TEST_SMEM_KB=%s", text);
  } else {
    expect(status.code == cudaSuccess && seen.launched_kb == (kb ? kb : 227),
           "FLASH_ATTN_TEST_SMEM_KB=%s: launched for %d KB", text, seen.launched_kb);
  }
  limit_smem_kb(0);
}

// What the environment's FLASH_ATTN_ISA does; the other checks begin after that.
void check_environment(char const* isa) {
  expect(std::strcmp(pinned_isa(), isa) == 0, "pinned to %s, not %s", pinned_isa(), isa);
  setenv("FLASH_ATTN_ISA", "changed", 1);  // nobody reads it again
  seen                = {};
  Status const status = launch_fwd(call<FwdParams>(MaskKind::kCausal), nullptr);
  if (std::strcmp(isa, "hopper") == 0) {
    expect_failure("a variable that names no isa", status,
                   {"FLASH_ATTN_ISA=hopper", "sm90 or sm80"});
  } else {
    int const want = std::strcmp(isa, "sm80") == 0 ? 80 : 90;
    expect(status.code == cudaSuccess && seen.launched == want, "launched by sm%d, not sm%d",
           seen.launched, want);
  }
  pin_isa("");
}

int main(int count, char** arguments) {
  char const *const isa = count > 1 ? arguments[1] : "", *const kb = count > 2 ? arguments[2] : "";
  if (!*isa) { check_smem_environment(kb); }
  check_environment(isa);
  check_who_plans_launches();
  check_pin();
  check_messages();
  check_smem_limit();
  check_refusals();
  return check::finish();
}
