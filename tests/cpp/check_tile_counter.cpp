// Check of the order in which thread blocks of the sm90 forward take tiles from their counter (sm90/fwd/producer.cuh): random
// interleavings.  Every tile is done once, and the counter is zero again, so that the next launch can use it.
#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "interleave.h"

using namespace interleave;
using check::expect;

// Launches one after another: each tile takes one ticket, those without rows (empty) too; with skips these take none, which is wrong.
std::string run_counter(int blocks, int tiles, bool skips, Random& draw) {
  Machine machine(0, draw);
  int counter = 0;
  for (int launch = 0; launch < 3 && machine.wrong.empty(); ++launch) {
    std::vector<int> done(tiles, 0), numbers(blocks), tickets(blocks, -1);
    std::vector<char> is_empty(tiles);
    for (char& empty : is_empty) { empty = below(draw, 3) == 0; }
    machine.agents.assign(blocks, {});
    for (int b = 0; b < blocks; ++b) {
      numbers[b]   = b;
      Agent& agent = machine.agents[b];
      agent.refill = [&, b] {
        if (numbers[b] >= tiles) { return false; }
        bool const takes = !(skips && is_empty[numbers[b]]);
        agent.add_once([&, b, takes] { tickets[b] = takes ? counter++ : tickets[b] + 1; });
        agent.add_once([&, b] { ++done[numbers[b]]; });
        agent.add_once([&, b] { counter = tickets[b] == tiles - 1 ? 0 : counter; });
        agent.add_once([&, b] { numbers[b] = blocks + tickets[b]; });
        return true;
      };
    }
    machine.run();
    for (int times : done) {
      if (times != 1) { machine.fail("a tile is not done once"); }
    }
    if (counter != 0) { machine.fail("the counter is not zero"); }
  }
  return machine.wrong;
}

int main() {
  Random draw(1);
  for (int sms : {1, 2, 3, 8, 20}) {
    for (int tiles : {1, 2, 7, 8, 9, 20, 21, 100}) {
      int const blocks = std::min(tiles, sms);
      for (int i = 0; i < 10; ++i) {
        auto const wrong = run_counter(blocks, tiles, false, draw);
        expect(wrong.empty(), "%d thread blocks, %d tiles: %s", blocks, tiles, wrong.c_str());
      }
    }
  }
  expect(!run_counter(8, 100, true, draw).empty(), "tiles that take no ticket are not noticed");
  return check::finish();
}
