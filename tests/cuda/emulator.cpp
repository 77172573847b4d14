// The fibers of emulator.h and their scheduler. Compiled without sanitizers in every build: what it reads
// and writes is no access of a kernel. VQK_ASAN and VQK_TSAN: the rest of the program is instrumented.
#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <random>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#ifdef VQK_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef VQK_TSAN
#include <sanitizer/tsan_interface.h>
#endif

namespace vqk::emulator {

Settings settings;
Thread* current;

namespace {

constexpr size_t kStack = 128 << 10, kPage = 4096, kRedZone = 128;
constexpr size_t kSanitizerFibers = 1280;  // each takes TSan half a megabyte

enum class Wait { nothing, block, warp, ended };

struct Lane : Thread {
  int number, warp;
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  Wait wait = Wait::nothing;
  const Place* place = nullptr;
  unsigned mask = 0;
  bool ordered = false;
  Act act = nullptr;
  void* mine = nullptr;
  std::vector<Copy> open;
  std::deque<std::deque<Copy>> groups;
  void *tsan = nullptr, *asan = nullptr;
#if !defined(__x86_64__)
  ucontext_t context;
#endif
};

struct Scheduler {
  void* stack_pointer = nullptr;
  void *tsan = nullptr, *asan = nullptr;
  const void* bottom = nullptr;
  size_t size = 0;
#if !defined(__x86_64__)
  ucontext_t context;
#endif
};

const Launch* running;
std::vector<Lane> lanes;
Scheduler scheduler;
std::mt19937 random_numbers;
unsigned char* arena;
size_t arena_used;
int64_t static_left;
std::map<const Place*, void*> variables;
std::vector<char*> free_stacks, used_stacks;
std::vector<void*> used_arenas;
std::vector<void*> fibers;
size_t fibers_used;
char block_start, launch_end, global_fence;

Lane& me() { return *static_cast<Lane*>(current); }

// ------------------------------------------------------------------------------------------------------------- fibers

#if defined(__x86_64__)
extern "C" void vqk_switch_stack(void** from, void* to);
asm(R"(.text
.type vqk_switch_stack,@function
vqk_switch_stack:
 pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
 movq %rsp,(%rdi); movq %rsi,%rsp
 popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
 ret
.size vqk_switch_stack,.-vqk_switch_stack
)");
void to_lane(Lane& lane) { vqk_switch_stack(&scheduler.stack_pointer, lane.stack_pointer); }
void to_scheduler(Lane& lane) { vqk_switch_stack(&lane.stack_pointer, scheduler.stack_pointer); }
void prepare(Lane& lane, void (*start)()) {
  void** top = reinterpret_cast<void**>(lane.stack + kStack);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(start);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  lane.stack_pointer = top;
}
#else
void to_lane(Lane& lane) { swapcontext(&scheduler.context, &lane.context); }
void to_scheduler(Lane& lane) { swapcontext(&lane.context, &scheduler.context); }
void prepare(Lane& lane, void (*start)()) {
  getcontext(&lane.context);
  lane.context.uc_stack.ss_sp = lane.stack;
  lane.context.uc_stack.ss_size = kStack;
  lane.context.uc_link = nullptr;
  makecontext(&lane.context, start, 0);
}
#endif

// TSan's idea of who runs; no order comes with it.
void act_as([[maybe_unused]] void* fiber) {
#ifdef VQK_TSAN
  __tsan_switch_to_fiber(fiber, 1);
#endif
}
void release([[maybe_unused]] void* at) {
#ifdef VQK_TSAN
  __tsan_release(at);
#endif
}
void acquire([[maybe_unused]] void* at) {
#ifdef VQK_TSAN
  __tsan_acquire(at);
#endif
}

// One for every thread of a launch, made once and kept: they cost TSan much. A launch with more threads than it can tell
// apart uses them again, and a race between the two goes unseen.
void* next_fiber() {
#ifdef VQK_TSAN
  if (fibers_used == kSanitizerFibers) fibers_used = 0;
  if (fibers_used == fibers.size()) fibers.push_back(__tsan_create_fiber(0));
  act_as(fibers[fibers_used]);
  acquire(&block_start);
  act_as(scheduler.tsan);
  return fibers[fibers_used++];
#else
  return nullptr;
#endif
}

// While a fiber is in here its memory management is the scheduler's.
struct Inside {
  Inside() { act_as(scheduler.tsan); }
  ~Inside() { act_as(me().tsan); }
};

void resume(Lane& lane) {
  current = &lane;
#ifdef VQK_ASAN
  __sanitizer_start_switch_fiber(&scheduler.asan, lane.stack, kStack);
#endif
  act_as(lane.tsan);
  to_lane(lane);
#ifdef VQK_ASAN
  __sanitizer_finish_switch_fiber(scheduler.asan, nullptr, nullptr);
#endif
  current = nullptr;
}

void yield() {
  Lane& lane = me();
#ifdef VQK_ASAN
  __sanitizer_start_switch_fiber(lane.wait == Wait::ended ? nullptr : &lane.asan, scheduler.bottom, scheduler.size);
#endif
  act_as(scheduler.tsan);
  to_scheduler(lane);
#ifdef VQK_ASAN
  __sanitizer_finish_switch_fiber(lane.asan, &scheduler.bottom, &scheduler.size);
#endif
}

void start() {
#ifdef VQK_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &scheduler.bottom, &scheduler.size);
#endif
  running->body(running->context);
  release(&launch_end);
  me().wait = Wait::ended;
  yield();
  std::abort();
}

char* new_stack() {
  if (free_stacks.empty()) {
    char* whole = static_cast<char*>(
        mmap(nullptr, kStack + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (whole == MAP_FAILED) fail("no memory for the stacks");
    mprotect(whole, kPage, PROT_NONE);  // a stack that overflows ends the program
    free_stacks.push_back(whole + kPage);
  }
  used_stacks.push_back(free_stacks.back());
  free_stacks.pop_back();
  return used_stacks.back();
}

// What a block leaves is used again: by the next block, or under TSan, which would see races, after the launch.
void reuse() {
  free_stacks.insert(free_stacks.end(), used_stacks.begin(), used_stacks.end());
  used_stacks.clear();
  for (void* memory : used_arenas) std::free(memory);
  used_arenas.clear();
}

// ---------------------------------------------------------------------------------------------------------- meetings

// Each of `group` sees what every other one did before. The place is a new one for every meeting: otherwise an
// early arrival at the next would tell a late one of the last more than it may know.
void order([[maybe_unused]] const std::vector<Lane*>& group) {
#ifdef VQK_TSAN
  static std::vector<uint64_t> places(1 << 20);
  static size_t next = 0;
  void* const place = &places[next++ % places.size()];
  for (Lane* lane : group) act_as(lane->tsan), release(place);
  for (Lane* lane : group) act_as(lane->tsan), acquire(place);
  act_as(scheduler.tsan);
#endif
}

void let_go(const std::vector<Lane*>& group, bool ordered, Act act, int count, int lane_of(const Lane&)) {
  if (act) {
    std::vector<void*> brought(count);
    for (Lane* lane : group) brought[lane_of(*lane)] = lane->mine;
    act(count, brought.data());
  }
  if (ordered) order(group);
  for (Lane* lane : group) lane->wait = Wait::nothing;
}

// Lets go the groups of lanes that are complete.
bool release_warp(int first, int end) {
  bool any = false;
  for (int i = first; i < end; ++i) {
    Lane& lane = lanes[i];
    if (lane.wait != Wait::warp) continue;
    std::vector<Lane*> group;
    bool complete = true;
    for (int j = 0; j < 32; ++j) {
      if (!(lane.mask >> j & 1)) continue;
      if (first + j >= end || lanes[first + j].wait == Wait::ended) {
        current = &lane;
        fail("%s:%d: %s waits for lane %d, which %s", lane.place->file, lane.place->line, lane.place->what, j,
             first + j >= end ? "does not exist" : "has ended");
      }
      Lane& other = lanes[first + j];
      complete &= other.wait == Wait::warp && other.mask == lane.mask && other.place == lane.place;
      group.push_back(&other);
    }
    if (!complete) continue;
    let_go(group, lane.ordered, lane.act, 32, [](const Lane& l) { return l.lane; });
    any = true;
  }
  return any;
}

void release_block() {
  std::vector<Lane*> group;
  int ended = 0;
  const Lane *here = nullptr, *there = nullptr, *in_warp = nullptr;
  for (Lane& lane : lanes) {
    ended += lane.wait == Wait::ended;
    if (lane.wait == Wait::warp) in_warp = &lane;
    if (lane.wait != Wait::block) continue;
    group.push_back(&lane);
    if (!here) here = &lane;
    else if (lane.place != here->place) there = &lane;
  }
  if (in_warp) {
    current = const_cast<Lane*>(in_warp);
    fail("%s:%d: deadlock: %s waits for lanes 0x%x, some of which wait elsewhere", in_warp->place->file,
         in_warp->place->line, in_warp->place->what, in_warp->mask);
  }
  current = const_cast<Lane*>(here);
  if (ended)
    fail("%s:%d: %s reached by %zu of %zu threads: the others have ended", here->place->file, here->place->line,
         here->place->what, group.size(), lanes.size());
  if (there)
    fail("%s:%d: %s is divergent: other threads wait at line %d", here->place->file, here->place->line,
         here->place->what, there->place->line);
  let_go(group, true, here->act, static_cast<int>(lanes.size()), [](const Lane& l) { return l.number; });
}

// --------------------------------------------------------------------------------------------------------- scheduler

void begin_block(uint3 block) {
  const Launch& launch = *running;
  const size_t size = launch.shared_bytes + kStaticShared + 64 * kRedZone;
  void* memory = nullptr;
  if (posix_memalign(&memory, 1024, size)) fail("no memory for shared memory");
  arena = static_cast<unsigned char*>(memory);
  std::memset(arena, 0xff, size);
  used_arenas.push_back(arena);
  arena_used = launch.shared_bytes;
  static_left = launch.static_left;
#ifdef VQK_ASAN
  ASAN_POISON_MEMORY_REGION(arena + launch.shared_bytes, size - launch.shared_bytes);
#endif
  variables.clear();
  const dim3 b = launch.block;
  lanes.clear();
  lanes.resize(static_cast<size_t>(b.x) * b.y * b.z);
  release(&block_start);
  for (unsigned i = 0; i < lanes.size(); ++i) {
    Lane& lane = lanes[i];
    lane.thread = {i % b.x, i / b.x % b.y, i / (b.x * b.y)};
    lane.block = block;
    lane.block_size = b;
    lane.grid = launch.grid;
    lane.number = static_cast<int>(i);
    lane.warp = lane.number / 32;
    lane.lane = lane.number % 32;
    lane.stack = new_stack();
    prepare(lane, start);
    lane.tsan = next_fiber();
  }
}

void end_block() {
#ifdef VQK_ASAN
  ASAN_UNPOISON_MEMORY_REGION(arena, running->shared_bytes + kStaticShared + 64 * kRedZone);
#endif
#ifndef VQK_TSAN
  reuse();
#endif
}

void run_block(uint3 block) {
  begin_block(block);
  const int count = static_cast<int>(lanes.size()), warps = (count + 31) / 32;
  const bool patient = random_numbers() % 2;  // a warp runs as far as it can before the next one
  std::vector<int> ready(warps), order(32);
  for (int w = 0; w < warps; ++w) ready[w] = w;
  while (true) {
    if (ready.empty()) {
      bool over = true;
      for (const Lane& lane : lanes) over &= lane.wait == Wait::ended;
      if (over) break;
      release_block();
      for (int w = 0; w < warps; ++w) ready.push_back(w);
    }
    const size_t pick = random_numbers() % ready.size();
    const int first = 32 * ready[pick], end = std::min(count, first + 32);
    bool more = true;
    do {
      order.resize(end - first);
      for (int i = first; i < end; ++i) order[i - first] = i;
      std::shuffle(order.begin(), order.end(), random_numbers);
      for (int i : order)
        if (lanes[i].wait == Wait::nothing) resume(lanes[i]);
      more = release_warp(first, end);
    } while (more && patient);
    if (!more) {
      ready[pick] = ready.back();
      ready.pop_back();
    }
  }
  end_block();
}

}  // namespace

void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "emulator: %s", text);
  if (current)
    std::fprintf(stderr, "; thread (%u, %u, %u) of block (%u, %u, %u)", current->thread.x, current->thread.y,
                 current->thread.z, current->block.x, current->block.y, current->block.z);
  std::fprintf(stderr, "\n");
  std::fflush(nullptr);
  std::_Exit(3);
}

void meet_block(const Place* place, Act act, void* mine) {
  Lane& lane = me();
  lane.wait = Wait::block;
  lane.place = place;
  lane.act = act;
  lane.mine = mine;
  yield();
}

void meet_warp(unsigned mask, const Place* place, bool ordered, Act act, void* mine) {
  Lane& lane = me();
  if (!(mask >> lane.lane & 1))
    fail("%s:%d: %s: the mask 0x%x lacks the calling lane", place->file, place->line, place->what, mask);
  lane.wait = Wait::warp;
  lane.place = place;
  lane.mask = mask;
  lane.ordered = ordered;
  lane.act = act;
  lane.mine = mine;
  yield();
}

void* shared_variable(const Place* place, size_t bytes) {
  const Inside inside;
  void*& variable = variables[place];
  if (!variable) {
    const size_t at = (arena_used + kRedZone + 127) / 128 * 128;
    static_left -= static_cast<int64_t>((bytes + 15) / 16 * 16);
    if (static_left < 0 || at + bytes > running->shared_bytes + kStaticShared + 64 * kRedZone)
      fail("%s:%d: %s is more than the device has left for static shared memory, beside %zu dynamic bytes", place->file,
           place->line, place->what, running->shared_bytes);
    variable = arena + at;
    arena_used = at + bytes;
#ifdef VQK_ASAN
    ASAN_UNPOISON_MEMORY_REGION(variable, bytes);
#endif
  }
  return variable;
}

void* dynamic_shared() { return arena; }

// Two fences order what lies before the first and after the second: more than the device promises, which wants an
// atomic between them.
void fence() {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
  acquire(&global_fence);
  release(&global_fence);
}

void copy_later(Copy copy) {
  const Inside inside;
  me().open.push_back(copy);
}

void commit_copies() {
  const Inside inside;
  Lane& lane = me();
  lane.groups.emplace_back(lane.open.begin(), lane.open.end());
  lane.open.clear();
}

bool next_copy(int groups_left, Copy* copy) {
  const Inside inside;
  auto& groups = me().groups;
  while (static_cast<int>(groups.size()) > groups_left) {
    if (groups.front().empty()) {
      groups.pop_front();
      continue;
    }
    *copy = groups.front().front();
    groups.front().pop_front();
    return true;
  }
  return false;
}

void run(const Launch& l) {
  running = &l;
  random_numbers.seed(settings.seed);
#ifdef VQK_TSAN
  scheduler.tsan = __tsan_get_current_fiber();
  fibers_used = 0;
#endif
  std::vector<uint64_t> blocks(static_cast<uint64_t>(l.grid.x) * l.grid.y * l.grid.z);
  for (uint64_t i = 0; i < blocks.size(); ++i) blocks[i] = i;
  std::shuffle(blocks.begin(), blocks.end(), random_numbers);
  for (uint64_t i : blocks) {
    const unsigned x = static_cast<unsigned>(i % l.grid.x), yz = static_cast<unsigned>(i / l.grid.x);
    run_block({x, yz % l.grid.y, yz / l.grid.y});
  }
  acquire(&launch_end);
  reuse();
}

int counted(int predicate, const Place* place) {
  int64_t mine = predicate;
  meet_block(place, reduce_add, &mine);
  return static_cast<int>(mine);
}

}  // namespace vqk::emulator
